"""Traffic, measurements and reports for switchgear; everything here drives the public API of the other two packages."""
