#include "parallel/row_sums.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/BFloat16.h>

#include <stdexcept>
#include <vector>

#include "parallel/row_sums_params.h"

namespace dsa {
namespace {

at::ScalarType wide_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

template <typename T, typename W>
void sum_rows(const at::Tensor& x_SH, const at::Tensor& first, const at::Tensor& row, const at::Tensor& weight, const at::Tensor& out_TH) {
  const int64_t width = x_SH.size(1), *begin = first.const_data_ptr<int64_t>(), *rows = row.const_data_ptr<int64_t>();
  const T* x = x_SH.const_data_ptr<T>();
  const W* w = weight.defined() ? weight.const_data_ptr<W>() : nullptr;
  T* out = out_TH.data_ptr<T>();
  at::parallel_for(0, out_TH.size(0), 16, [&](int64_t from, int64_t to) {
    std::vector<W> sum(width);
    for (int64_t t = from; t < to; ++t) {
      std::fill(sum.begin(), sum.end(), W(0));
      for (int64_t i = begin[t]; i < begin[t + 1]; ++i) {
        const T* source = x + rows[i] * width;
        const W by = w ? w[rows[i]] : W(1);
        for (int64_t c = 0; c < width; ++c) sum[c] += by * static_cast<W>(source[c]);
      }
      for (int64_t c = 0; c < width; ++c) out[t * width + c] = static_cast<T>(sum[c]);
    }
  });
}

template <typename T, typename W>
void scale_rows(const at::Tensor& g_SH, const at::Tensor& of, const at::Tensor& weight, const at::Tensor& y_MH, const at::Tensor& out_MH,
                const at::Tensor& dot_M) {
  const int64_t width = g_SH.size(1), *source = of.const_data_ptr<int64_t>();
  const T *g = g_SH.const_data_ptr<T>(), *y = y_MH.const_data_ptr<T>();
  const W* w = weight.const_data_ptr<W>();
  T* out = out_MH.data_ptr<T>();
  W* dot = dot_M.data_ptr<W>();
  at::parallel_for(0, out_MH.size(0), 16, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) {
      W sum = 0;
      for (int64_t c = 0; c < width; ++c) {
        const W value = static_cast<W>(g[source[m] * width + c]);
        sum += value * static_cast<W>(y[m * width + c]);
        out[m * width + c] = static_cast<T>(w[m] * value);
      }
      dot[m] = sum;
    }
  });
}

// f<T, W>() for the dtype of x; W: what is summed in.
template <typename F>
void by_type(const at::Tensor& x, F f) {
  if (x.scalar_type() == at::kDouble) f.template operator()<double, double>();
  else if (x.scalar_type() == at::kFloat) f.template operator()<float, float>();
  else if (x.scalar_type() == at::kBFloat16) f.template operator()<c10::BFloat16, float>();
  else throw std::invalid_argument("cannot add rows (they are not fp64, fp32 or bf16) convert them");
}

#ifdef DSA_HAVE_CUDA
RowType row_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? RowType::FP64 : x.scalar_type() == at::kFloat ? RowType::FP32 : RowType::BF16;
}
CUstream_st* current_stream(const at::Tensor& x) {
  const auto* guard = c10::impl::getDeviceGuardImpl(x.device().type());
  return static_cast<CUstream_st*>(guard->getStreamNativeHandle(guard->getStream(x.device())));
}
#else
[[noreturn]] void without_cuda() {
  throw std::logic_error("cannot add rows on a GPU (this program was built without CUDA) build it where nvcc is found");
}
#endif

}  // namespace

at::Tensor row_sums(const at::Tensor& x, const at::Tensor& first_T1, const at::Tensor& row_N, const at::Tensor& weight) {
  const at::Tensor x_SH = x.contiguous(), w_S = weight.defined() ? weight.to(wide_type(x)).contiguous() : weight;
  const at::Tensor out_TH = at::empty({first_T1.size(0) - 1, x.size(1)}, x.options().requires_grad(false));
  by_type(x, [&]<typename T, typename W>() {
    if (!x.is_cuda()) return sum_rows<T, W>(x_SH, first_T1, row_N, w_S, out_TH);
#ifdef DSA_HAVE_CUDA
    RowSumsParams p;
    p.type = row_type(x), p.targets = out_TH.size(0), p.width = x.size(1);
    p.x = x_SH.const_data_ptr(), p.first = first_T1.const_data_ptr<int64_t>(), p.row = row_N.const_data_ptr<int64_t>();
    p.weight = w_S.defined() ? w_S.const_data_ptr() : nullptr;
    p.out = out_TH.data_ptr(), p.stream = current_stream(x);
    launch_row_sums(p);
#else
    without_cuda();
#endif
  });
  return out_TH;
}

std::pair<at::Tensor, at::Tensor> scaled_rows(const at::Tensor& g, const at::Tensor& of_M, const at::Tensor& weight, const at::Tensor& y) {
  const at::Tensor g_SH = g.contiguous(), y_MH = y.contiguous(), w_M = weight.to(wide_type(g)).contiguous();
  const at::Tensor out_MH = at::empty(y.sizes(), y.options().requires_grad(false));
  const at::Tensor dot_M = at::empty({y.size(0)}, w_M.options().requires_grad(false));
  by_type(g, [&]<typename T, typename W>() {
    if (!g.is_cuda()) return scale_rows<T, W>(g_SH, of_M, w_M, y_MH, out_MH, dot_M);
#ifdef DSA_HAVE_CUDA
    ScaledRowsParams p;
    p.type = row_type(g), p.rows = y.size(0), p.width = y.size(1);
    p.g = g_SH.const_data_ptr(), p.of = of_M.const_data_ptr<int64_t>(), p.weight = w_M.const_data_ptr(), p.y = y_MH.const_data_ptr();
    p.out = out_MH.data_ptr(), p.dot = dot_M.data_ptr(), p.stream = current_stream(g);
    launch_scaled_rows(p);
#else
    without_cuda();
#endif
  });
  return {out_MH, dot_M.to(weight.scalar_type())};
}

}  // namespace dsa
