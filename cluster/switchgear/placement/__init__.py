"""Where experts go: the planner's policies, their cost model, and the plans they make. No torch, no Ray, no clock."""
