// The part of ONNX Runtime's C interface that a custom operator needs, declared here because its wheel has no headers.
//
// OrtApi is a table of function pointers.  ONNX Runtime only ever appends to it (its own build asserts the offsets of
// past versions), so a place in the table is part of the binary interface; GetApi(17) gives a table that has all places
// below since 1.17.  OrtCustomOp is a struct that the library fills in; `version` says how many of its members exist.
// Source: onnxruntime_c_api.h of ONNX Runtime 1.23; run with 1.31.1 and 1.32.0.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 17;

struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

enum Type { kUndefined = 0, kFloat = 1, kUint8 = 2, kFloat16 = 10 };
enum Presence { kRequired = 0, kOptional = 1 };

struct Table {
  void* entries[275];
};

struct ApiBase {
  const Table* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

template <int PLACE, class RETURN, class... ARGS>
struct Entry {
  static RETURN call(const Table* api, ARGS... args) {
    return reinterpret_cast<RETURN (*)(ARGS...)>(api->entries[PLACE])(args...);
  }
};

using CreateStatus = Entry<0, Status*, int, const char*>;
using CreateCustomOpDomain = Entry<26, Status*, const char*, Domain**>;
using CustomOpDomainAdd = Entry<27, Status*, Domain*, const struct CustomOp*>;
using AddCustomOpDomain = Entry<28, Status*, SessionOptions*, Domain*>;
using GetTensorMutableData = Entry<51, Status*, Value*, void**>;
using GetTensorElementType = Entry<60, Status*, const TensorInfo*, Type*>;
using GetDimensionsCount = Entry<61, Status*, const TensorInfo*, size_t*>;
using GetDimensions = Entry<62, Status*, const TensorInfo*, int64_t*, size_t>;
using GetTensorTypeAndShape = Entry<65, Status*, const Value*, TensorInfo**>;
using KernelInfoGetInteger = Entry<86, Status*, const KernelInfo*, const char*, int64_t*>;
using KernelContextGetInput = Entry<90, Status*, const KernelContext*, size_t, const Value**>;
using KernelContextGetOutput = Entry<91, Status*, KernelContext*, size_t, const int64_t*, size_t, Value**>;
using ReleaseStatus = Entry<93, void, Status*>;
using ReleaseTensorInfo = Entry<99, void, TensorInfo*>;
using KernelInfoGetInputCount = Entry<230, Status*, const KernelInfo*, size_t*>;
using KernelInfoGetConstant = Entry<249, Status*, const KernelInfo*, size_t, int*, const Value**>;
using ParallelFor = Entry<274, Status*, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

// Members in the order of OrtCustomOp, up to those of version 17.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Table*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  Type (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Type (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Presence (*GetInputCharacteristic)(const CustomOp*, size_t);
  Presence (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Table*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, void*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace ort
