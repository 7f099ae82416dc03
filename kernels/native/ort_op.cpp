// roundexport.kernels::GroupMatMul for ONNX Runtime: MatMulNBits with 3 bits and float16 scales, on this library's product.
//
//     inputs      A float32 [..., K]; B uint8 [N, groups, block*bits/8]; scales float16 or float32 [N, groups];
//                 zero_points uint8 [N, ceil(groups*bits/8)], optional; bias float32 [N], optional; all but A constant
//     attributes  K, N, bits (2, 3, 4, 8), block_size (a multiple of 32), accuracy_level (4: A is rounded to int8 per block;
//                 anything else: float32, slow)
//
// B, scales and zero points are packed into tiles when the session is made and not read afterwards; pages of the package's
// file that held them leave this process.  bias is read where it lies at every product: a session keeps its initializers.
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "roundexport_kernels.h"

namespace {

using namespace ort;

struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status) throw Failure{status};
}

struct Tensor {
  void* data;
  Type type;
  std::vector<int64_t> shape;
};

Tensor read(const Table* api, const Value* value, bool with_data = true) {
  Tensor tensor{};
  TensorInfo* raw = nullptr;
  check(GetTensorTypeAndShape::call(api, value, &raw));
  const auto release = [api](TensorInfo* info) { ReleaseTensorInfo::call(api, info); };
  const std::unique_ptr<TensorInfo, decltype(release)> info(raw, release);
  size_t count = 0;
  check(GetTensorElementType::call(api, raw, &tensor.type));
  check(GetDimensionsCount::call(api, raw, &count));
  tensor.shape.resize(count);
  check(GetDimensions::call(api, raw, tensor.shape.data(), count));
  if (with_data) check(GetTensorMutableData::call(api, const_cast<Value*>(value), &tensor.data));
  return tensor;
}

int64_t elements(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t dim : tensor.shape) count *= dim;
  return count;
}

struct Kernel {
  const Table* api;
  RoundexportWeight* weight = nullptr;
  const float* bias = nullptr;
  int64_t columns = 0, rows = 0;
  bool exact = false;

  Kernel(const Table* table, const KernelInfo* info) : api(table) {
    columns = integer(info, "K"), rows = integer(info, "N");
    exact = integer(info, "accuracy_level") != 4;
    const int64_t bits = integer(info, "bits"), block = integer(info, "block_size");
    if (columns < 1 || rows < 1 || bits < 1 || block < 1) refuse("K, N, bits and block_size must be positive");
    const int64_t groups = (columns + block - 1) / block;
    const Tensor codes = constant(info, 1, kUint8, rows * groups * block * bits / 8);
    const Tensor scales = constant(info, 2, kUndefined, rows * groups);
    if (scales.type != kFloat && scales.type != kFloat16) refuse("scales must be float16 or float32");
    size_t inputs = 0;
    check(KernelInfoGetInputCount::call(api, info, &inputs));
    const uint8_t* zero_points = nullptr;
    if (inputs > 3) zero_points = static_cast<uint8_t*>(optional(info, 3, kUint8, rows * ((groups * bits + 7) / 8)));
    if (inputs > 4) bias = static_cast<float*>(optional(info, 4, kFloat, rows));
    weight = roundexport_weight(static_cast<uint8_t*>(codes.data), scales.data, scales.type == kFloat16, zero_points,
                                static_cast<int>(columns), static_cast<int>(rows), static_cast<int>(bits),
                                static_cast<int>(block));
    if (!weight) refuse("bits must be 2, 3, 4 or 8 and block_size a multiple of 32, or memory is short");
  }
  ~Kernel() { roundexport_free_weight(weight); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  [[noreturn]] void refuse(const std::string& why) const {
    throw Failure{CreateStatus::call(api, 2, ("GroupMatMul: " + why).c_str())};
  }
  int64_t integer(const KernelInfo* info, const char* name) const {
    int64_t value = 0;
    check(KernelInfoGetInteger::call(api, info, name, &value));
    return value;
  }
  void* optional(const KernelInfo* info, size_t index, Type type, int64_t count) const {
    const Value* value = nullptr;
    int is_constant = 0;
    check(KernelInfoGetConstant::call(api, info, index, &is_constant, &value));
    if (!value) return nullptr;
    return constant(info, index, type, count).data;
  }
  Tensor constant(const KernelInfo* info, size_t index, Type type, int64_t count) const {
    const Value* value = nullptr;
    int is_constant = 0;
    check(KernelInfoGetConstant::call(api, info, index, &is_constant, &value));
    if (!is_constant || !value) refuse("input " + std::to_string(index) + " must be an initializer");
    Tensor tensor = read(api, value);
    if ((type != kUndefined && tensor.type != type) || elements(tensor) != count)
      refuse("input " + std::to_string(index) + " has another type, or not " + std::to_string(count) + " elements");
    return tensor;
  }

  void compute(KernelContext* context) const {
    const Value* input = nullptr;
    check(KernelContextGetInput::call(api, context, 0, &input));
    Tensor x = read(api, input);
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != columns) refuse("A must be float32 with K columns");
    const int64_t count = elements(x) / columns;
    x.shape.back() = rows;
    Value* output = nullptr;
    check(KernelContextGetOutput::call(api, context, 0, x.shape.data(), x.shape.size(), &output));
    void* y = nullptr;
    check(GetTensorMutableData::call(api, output, &y));
    struct Threads {
      const Table* api;
      KernelContext* context;
    } threads{api, context};
    const auto parallel = [](void* data, void (*task)(void*, size_t), size_t tasks, void* work) {
      const Threads& own = *static_cast<Threads*>(data);
      Status* status = tasks > 1 ? ParallelFor::call(own.api, own.context, task, tasks, 0, work) : nullptr;
      if (status) ReleaseStatus::call(own.api, status);
      if (tasks <= 1 || status)
        for (size_t i = 0; i < tasks; i++) task(work, i);
    };
    if (count > 0)
      (exact ? roundexport_exact_product : roundexport_product)(weight, static_cast<float*>(x.data),
                                                                static_cast<int>(count), bias, static_cast<float*>(y),
                                                                parallel, &threads);
  }
};

template <class F>
Status* guarded(const Table* api, F&& work) {
  try {
    work();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return CreateStatus::call(api, 1, error.what());
  }
}

const CustomOp* group_matmul() {
  static const CustomOp op = [] {
    CustomOp made{};
    made.version = kVersion;
    made.GetName = [](const CustomOp*) { return "GroupMatMul"; };
    made.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
    made.GetInputTypeCount = [](const CustomOp*) -> size_t { return 5; };
    made.GetInputType = [](const CustomOp*, size_t index) {
      constexpr Type types[] = {kFloat, kUint8, kUndefined, kUint8, kFloat};
      return types[index];
    };
    made.GetInputCharacteristic = [](const CustomOp*, size_t index) { return index < 3 ? kRequired : kOptional; };
    made.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
    made.GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
    made.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
    made.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    made.GetVariadicInputMinArity = made.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    made.GetVariadicInputHomogeneity = made.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
    made.CreateKernelV2 = [](const CustomOp*, const Table* api, const KernelInfo* info, void** kernel) {
      return guarded(api, [&] { *kernel = new Kernel(api, info); });
    };
    made.KernelComputeV2 = [](void* kernel, KernelContext* context) {
      const Kernel& own = *static_cast<Kernel*>(kernel);
      return guarded(own.api, [&] { own.compute(context); });
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.GetStartVersion = [](const CustomOp*) { return 1; };
    made.GetEndVersion = [](const CustomOp*) { return 1 << 20; };
    return made;
  }();
  return &op;
}

}  // namespace

extern "C" Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const Table* api = base->GetApi(kVersion);
  if (!api) return nullptr;  // older than 1.17: sessions that need the operator say that it is missing
  static Domain* domain = nullptr;
  return guarded(api, [&] {
    if (!domain) {
      check(CreateCustomOpDomain::call(api, "roundexport.kernels", &domain));
      check(CustomOpDomainAdd::call(api, domain, group_matmul()));
    }
    check(AddCustomOpDomain::call(api, options, domain));
  });
}
