// What MLX's own preamble gives every kernel, of which only the names of types are needed here.
#pragma once
#include <metal_stdlib>

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;
