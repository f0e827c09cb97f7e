// The storage types every op takes, for the files that see raw pointers only.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Expands EF_DEFINE(scalar_t) for each: explicit instantiation of the launch functions. Tests that need float32 alone build no more.
#if defined(EF_ONLY_FLOAT32)
#define EF_FOR_EACH_FLOATING(EF_DEFINE) EF_DEFINE(float)
#else
#define EF_FOR_EACH_FLOATING(EF_DEFINE) EF_DEFINE(double) EF_DEFINE(float) EF_DEFINE(c10::Half) EF_DEFINE(c10::BFloat16)
#endif
