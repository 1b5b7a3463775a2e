// fastgan::product_into for PyTorch, where the CPU has AMX; see fastgan/ops/product.py for the schema in
// words.
#include "product/product.h"

#include "common/tensor.h"

namespace {

using fastgan::ScalarType;
using fastgan::Tensor;

const fastgan::bfloat16* factor(const Tensor& tensor, const char* name, int64_t (&stride)[2]) {
  FASTGAN_CHECK(tensor.scalar_type() == ScalarType::BFloat16 && tensor.dim() == 2 && tensor.is_cpu(), name,
                " must be a matrix of bfloat16 on the CPU");
  stride[0] = tensor.stride(0), stride[1] = tensor.stride(1);
  return static_cast<const fastgan::bfloat16*>(tensor.const_data_ptr());
}

void product_into(Tensor out, Tensor a, Tensor b, bool add) {
  fastgan::ProductArgs args{};
  args.a = factor(a, "a", args.a_stride);
  args.b = factor(b, "b", args.b_stride);
  args.rows = a.size(0), args.depth = a.size(1), args.columns = b.size(1);
  FASTGAN_CHECK(b.size(0) == args.depth, "b must have a's ", args.depth, " columns as rows, got ", b.size(0));
  const bool narrow = out.scalar_type() == ScalarType::BFloat16;
  FASTGAN_CHECK((narrow || out.scalar_type() == ScalarType::Float) && out.is_cpu() && out.dim() == 2 &&
                    out.size(0) == args.rows && out.size(1) == args.columns &&
                    (args.columns <= 1 || out.stride(1) == 1),
                "out must be float32 or bfloat16, of ", args.rows, " x ", args.columns,
                " numbers, those of a row side by side");
  args.c = out.mutable_data_ptr();
  args.c_stride = out.stride(0);
  args.c_is_bfloat16 = narrow;
  args.add = add;
  bool out_of_memory = false;
  args.out_of_memory = &out_of_memory;
  FASTGAN_CHECK(fastgan::capability() == fastgan::Capability::amx,
                "product_into needs a CPU with AMX, and capability 'amx'");
#if defined(__x86_64__)
  fastgan_product_amx(args, fastgan::torch_threads());
#endif
  FASTGAN_CHECK(!out_of_memory, "product_into: no memory left for scratch");
}

}  // namespace

FASTGAN_LIBRARY_IMPL(m) { m.impl("product_into", TORCH_BOX(&product_into)); }
