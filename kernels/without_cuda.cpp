// The native side of a program built without CUDA: nothing is supported, so nothing of it is called.
#include <stdexcept>

#include "kernels/cross_entropy/native.h"
#include "kernels/dense_mla/native.h"
#include "kernels/grouped_mlp/native.h"
#include "kernels/indexer_kl/native.h"
#include "kernels/indexer_topk/native.h"
#include "kernels/rms_norm/native.h"
#include "kernels/rope/native.h"
#include "kernels/sparse_mla/native.h"

namespace dsa::native {
namespace {

bool refuse(const char** why_not) {
  *why_not = "built without CUDA";
  return false;
}
[[noreturn]] void unreachable() { throw std::logic_error("a device kernel was called (this program was built without CUDA) ask supports() first"); }

}  // namespace

bool indexer_supports(const at::Tensor&, const at::Tensor&, const char** why_not) { return refuse(why_not); }
bool topk_supports(const at::Tensor&, int64_t, const char** why_not) { return refuse(why_not); }
at::Tensor indexer_logits(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) { unreachable(); }
TopK topk_select(const at::Tensor&, int64_t) { unreachable(); }
TopK indexer_topk(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool) {
  unreachable();
}

bool indexer_kl_dense_supports(const at::Tensor&, const IndexerInputs&, const char** why_not) { return refuse(why_not); }
IndexerLoss indexer_kl_dense(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, const IndexerInputs&, const at::Tensor&,
                             const at::Tensor&, int64_t, const at::Tensor&, double, bool) {
  unreachable();
}
bool indexer_kl_sparse_supports(const IndexerInputs&, const TopK&, const char** why_not) { return refuse(why_not); }
IndexerLoss indexer_kl_sparse(const at::Tensor&, const TopK&, const IndexerInputs&, const at::Tensor&, double, int64_t) { unreachable(); }

bool sparse_mla_supports(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, const char** why_not) {
  return refuse(why_not);
}
SparseMlaOutput sparse_mla_forward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) { unreachable(); }
reference::SparseMlaGradients sparse_mla_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                  const at::Tensor&, const at::Tensor&, const at::Tensor&, double, int64_t) {
  unreachable();
}

bool dense_mla_supports(const at::Tensor&, const at::Tensor&, const char** why_not) { return refuse(why_not); }
reference::DenseMlaGradients dense_mla_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
  unreachable();
}

bool rope_supports(const at::Tensor&, const at::Tensor&, const RopeTable&, const char** why_not) { return refuse(why_not); }
void rope(const at::Tensor&, const at::Tensor&, const RopeTable&, RopeLayout, bool) { unreachable(); }

bool vocab_tile_supports(const at::Tensor&, const char** why_not) { return refuse(why_not); }
void vocab_tile_statistics(const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&, const at::Tensor&, const at::Tensor&) {
  unreachable();
}
at::Tensor vocab_tile_gradient(const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&, const at::Tensor&) { unreachable(); }

bool swiglu_supports(const at::Tensor&, const char** why_not) { return refuse(why_not); }
void swiglu(const at::Tensor&, const at::Tensor&, const at::Tensor&) { unreachable(); }
void swiglu_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) {
  unreachable();
}

bool rms_norm_supports(const at::Tensor&, const at::Tensor&, const char** why_not) { return refuse(why_not); }
std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor&, const at::Tensor&, double) { unreachable(); }
std::pair<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool) {
  unreachable();
}

}  // namespace dsa::native
