// Stands in for the header of the MACA SDK, so that the same kernels build without it: with nvcc (64-lane waves made
// of two warps) or with any C++17 compiler (an emulator that checks the rules of the machine).
#pragma once
#ifdef __CUDACC__
#include "sb_cuda.h"
#else
#include "sb_emulator.h"
#endif
