// What every C-ABI entry point shares: export marker, error reporting.
#pragma once

#define SG_API extern "C" __attribute__((visibility("default")))
