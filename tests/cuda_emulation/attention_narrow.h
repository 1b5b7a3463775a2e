// Included before the .cu files of attention where they are compiled under a sanitizer: the tiling of the
// narrowest heads alone, which all of the harness's cases have, and of what it asks of second order no
// float16. Everything takes minutes to compile.
#pragma once
#include "attention/attention_cuda_blocks.h"

#undef FASTGAN_ATTENTION_BY_DTYPE
#if defined(HARNESS_SECOND_ORDER)
#define FASTGAN_ATTENTION_BY_DTYPE(f)                              \
  (args.dtype == Dtype::float32    ? f<tf32, 64>(args, stream)     \
   : args.dtype == Dtype::bfloat16 ? f<bfloat16, 64>(args, stream) \
                                   : f<double, 64>(args, stream))
#else
#define FASTGAN_ATTENTION_BY_DTYPE(f)                              \
  (args.dtype == Dtype::float32    ? f<tf32, 64>(args, stream)     \
   : args.dtype == Dtype::bfloat16 ? f<bfloat16, 64>(args, stream) \
   : args.dtype == Dtype::float16  ? f<float16, 64>(args, stream)  \
                                   : f<double, 64>(args, stream))
#endif
