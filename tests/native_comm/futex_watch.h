// What the futex calls of a program came to, counted where they enter the kernel.
#pragma once

#include <cstdint>

#include "comm/layout.h"

// Before the first rank's thread begins.
void watch_doorbells(const sg::comm::Layout& layout, uint32_t world_size);

uint64_t watched_sleeps();

// Sleeps on a doorbell that ended by their time limit while the rank was not marked as sleeping and nobody had rung
// since the value it slept on. Peers ring only whom they see marked, so nothing but the time limit could have ended
// them. It must be 0, whatever the load: a ringer counts the doorbell up before it takes the mark back.
uint64_t lost_wakes();
