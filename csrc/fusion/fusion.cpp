// Tensor boundary of the weighted fusion: check, allocate, dispatch dtype and layout once, register.
#include "fusion.h"

#include "../common/tensor.h"

namespace ef::fusion {
namespace {
struct Options {
  const std::vector<Tensor>& inputs;
  const std::optional<Tensor>& weights;
  int64_t method;
  double eps;
  const std::vector<int64_t>& resample;
  int64_t h, w, activation;
  bool channels_last;
};

bool fits(const Tensor& x, Resample resample, int64_t h, int64_t w) {
  if (resample == Resample::kNone) return x.size(2) == h && x.size(3) == w;
  if (resample == Resample::kMaxPool) return (x.size(2) + 1) / 2 == h && (x.size(3) + 1) / 2 == w;
  return (x.size(2) > 0 || h == 0) && (x.size(3) > 0 || w == 0);
}

bool is_kept(const Tensor& x, const Tensor& grad, ScalarType dtype, bool channels_last) {
  return has_size_of(x, grad) && x.scalar_type() == dtype && is_dense(x, channels_last);
}

template <typename scalar_t>
Problem<scalar_t> problem_of(const Options& options) {
  const std::vector<Tensor>& inputs = options.inputs;
  STD_TORCH_CHECK(inputs.size() >= 2 && inputs.size() <= kMaxFusionInputs && options.resample.size() == inputs.size(), "fusion: 2 to ",
                  kMaxFusionInputs, " inputs, with a resampling for each");
  Problem<scalar_t> problem{};
  problem.count = int(inputs.size());
  for (int i = 0; i < problem.count; ++i) {
    const Tensor& x = inputs[i];
    const auto resample = choice_of<Resample>(options.resample[i], "fusion", "resample");
    STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == inputs[0].scalar_type() && x.size(0) == inputs[0].size(0) &&
                        x.size(1) == inputs[0].size(1) && is_dense(x, options.channels_last) && fits(x, resample, options.h, options.w),
                    "fusion: inputs must be dense [N, C, H, W] of one dtype and layout that fit the output");
    problem.inputs[i] = {const_data<scalar_t>(x), x.size(2), x.size(3), resample};
  }
  const int64_t n = inputs[0].size(0), c = inputs[0].size(1);
  problem.n = options.channels_last ? n : n * c;
  problem.c = options.channels_last ? c : 1;
  problem.h = options.h;
  problem.w = options.w;
  problem.method = choice_of<FusionMethod>(options.method, "fusion", "method");
  STD_TORCH_CHECK(options.weights.has_value() == (problem.method != FusionMethod::kSum), "fusion: weights are for all methods but the sum");
  if (options.weights) {
    STD_TORCH_CHECK(is_plain(*options.weights, {problem.count}, acc_dtype(inputs[0].scalar_type())),
                    "fusion: weights must be contiguous float32 (float64 for float64 inputs), one per input");
    problem.weights = const_data<acc_t<scalar_t>>(options.weights);
  }
  problem.eps = acc_t<scalar_t>(options.eps);
  problem.activation = activation_of(options.activation, "fusion");
  return problem;
}

// The output; after it, where they are kept, the maxima of each max_pool input and their taps.
template <class Device>
std::vector<Tensor> outputs(const Options& options, bool keeps) {
  STD_TORCH_CHECK(!options.inputs.empty() && options.inputs[0].dim() == 4, "fusion: inputs must be 2 to ", kMaxFusionInputs,
                  " tensors [N, C, H, W]");
  const Tensor& first = options.inputs[0];
  const DeviceScope<Device> scope(first);
  const auto like_output = [&](ScalarType dtype) {
    return allocate(first, {first.size(0), first.size(1), options.h, options.w}, dtype, options.channels_last);
  };
  std::vector<Tensor> results = {like_output(first.scalar_type())};
  dispatch_floating(first.scalar_type(), "fusion", [&]<typename scalar_t>() {
    const auto problem = problem_of<scalar_t>(options);
    Pooled<scalar_t> pooled{};
    for (int i = 0; keeps && i < problem.count; ++i) {
      if (problem.inputs[i].resample != Resample::kMaxPool) continue;
      results.push_back(like_output(first.scalar_type()));
      pooled.maxima[i] = mutable_data<scalar_t>(results.back());
      results.push_back(like_output(ScalarType::Byte));
      pooled.taps[i] = mutable_data<uint8_t>(results.back());
    }
    if (results[0].numel() > 0) launch_forward<scalar_t>(scope.device, problem, pooled, mutable_data<scalar_t>(results[0]));
  });
  return results;
}

template <class Device>
Tensor forward(const std::vector<Tensor>& inputs, const std::optional<Tensor>& weights, int64_t method, double eps,
               const std::vector<int64_t>& resample, int64_t h, int64_t w, int64_t activation, bool channels_last) {
  return outputs<Device>({inputs, weights, method, eps, resample, h, w, activation, channels_last}, false)[0];
}
template <class Device>
std::vector<Tensor> train(const std::vector<Tensor>& inputs, const std::optional<Tensor>& weights, int64_t method, double eps,
                          const std::vector<int64_t>& resample, int64_t h, int64_t w, int64_t activation, bool channels_last) {
  return outputs<Device>({inputs, weights, method, eps, resample, h, w, activation, channels_last}, true);
}

// `kept` is what fusion_train returns after its output. `needs` says for each input, and last for the weights, whether its gradient is
// wanted; those wanted are returned in that order.
template <class Device>
std::vector<Tensor> backward(const Tensor& grad, const std::vector<Tensor>& inputs, const std::vector<Tensor>& kept,
                             const std::optional<Tensor>& weights, int64_t method, double eps, const std::vector<int64_t>& resample,
                             int64_t activation, bool channels_last, const std::vector<bool>& needs) {
  const DeviceScope<Device> scope(grad);
  STD_TORCH_CHECK(!inputs.empty() && inputs[0].dim() == 4 && grad.dim() == 4 && is_dense(grad, channels_last) &&
                      needs.size() == inputs.size() + 1 && grad.scalar_type() == inputs[0].scalar_type() &&
                      grad.size(0) == inputs[0].size(0) && grad.size(1) == inputs[0].size(1),
                  "fusion_backward: grad must be dense and like the output, needs one per input and one for the weights");
  std::vector<Tensor> results, workspaces;
  dispatch_floating(grad.scalar_type(), "fusion_backward", [&]<typename scalar_t>() {
    using A = acc_t<scalar_t>;
    auto problem = problem_of<scalar_t>({inputs, weights, method, eps, resample, grad.size(2), grad.size(3), activation, channels_last});
    const Parents parents = Parents::of(problem);
    Backward<scalar_t> work{};
    work.grad = const_data<scalar_t>(grad);
    bool reads_grad_sum = false;
    size_t used = 0;
    for (int i = 0; i < problem.count; ++i) {
      Input<scalar_t>& input = problem.inputs[i];
      scalar_t* grad_input = nullptr;
      if (needs[i]) {
        results.push_back(allocate_like(inputs[i]));
        grad_input = mutable_data<scalar_t>(results.back());
        reads_grad_sum |= input.resample != Resample::kNone && !parents.own(input);
      }
      if (input.resample == Resample::kMaxPool) {
        STD_TORCH_CHECK(used + 2 <= kept.size() && is_kept(kept[used], grad, grad.scalar_type(), channels_last) &&
                            is_kept(kept[used + 1], grad, ScalarType::Byte, channels_last),
                        "fusion_backward: kept must be what fusion_train returned after its output");
        work.unpools[i] = {const_data<uint8_t>(kept[used + 1]), grad_input, input.h, input.w};
        input = {const_data<scalar_t>(kept[used]), problem.h, problem.w, Resample::kNone};
        used += 2;
      } else {
        work.grad_inputs[i] = grad_input;
      }
    }
    if (needs.back()) {
      STD_TORCH_CHECK(weights.has_value(), "fusion_backward: there are no weights to have a gradient");
      results.push_back(allocate_like(*weights));
      work.grad_weights = mutable_data<A>(results.back());
    }
    if (grad.numel() == 0) {
      for (Tensor& result : results) torch::stable::zero_(result);
      return;
    }
    if (work.grad_weights) {
      workspaces.push_back(allocate(grad, {partial_count(scope.device, problem) * problem.count}, acc_dtype(grad.scalar_type())));
      work.partials = mutable_data<A>(workspaces.back());
    }
    if (reads_grad_sum && problem.activation != Activation::kNone) {  // without an activation it is grad itself
      workspaces.push_back(allocate(grad, {grad.numel()}, grad.scalar_type()));
      work.grad_sum = mutable_data<scalar_t>(workspaces.back());
    }
    launch_backward<scalar_t>(scope.device, problem, work);
  });
  return results;
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  implement<"fusion", forward<Device>>(m);
  implement<"fusion_train", train<Device>>(m);
  implement<"fusion_backward", backward<Device>>(m);
}
}  // namespace
}  // namespace ef::fusion

EF_REGISTER(ef::fusion::register_ops)
