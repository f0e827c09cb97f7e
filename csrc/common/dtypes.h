// The storage types every op takes, for the files that see raw pointers only.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Expands EF_DEFINE(scalar_t) for each: explicit instantiation of the launch functions.
#define EF_FOR_EACH_FLOATING(EF_DEFINE) EF_DEFINE(double) EF_DEFINE(float) EF_DEFINE(c10::Half) EF_DEFINE(c10::BFloat16)
