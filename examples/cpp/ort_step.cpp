// One evaluation of a bundle's ONNX file with the C API of ONNX Runtime.
//
//     ort_step BUNDLE FOLDER BATCH
//
// Reads FOLDER/NAME.raw for every input of BUNDLE/model.onnx (x, t, y, ...), takes open dimensions to be BATCH, and writes
// every output (out.raw). Does not check the bundle's hashes: `dexport info BUNDLE` does.

#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef DEXPORT_NO_ORT_HEADERS
#include "ort_c_api_v1.h"
#else
#include <onnxruntime_c_api.h>
#endif
#include "tensors.h"

namespace {

// Version 1 of the API has all that this needs, so it runs with every ONNX Runtime.
constexpr std::uint32_t API_VERSION = 1;
const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime: " + message);
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

// What a create function made, with the release function that ends it.
template <typename T, typename Create>
Owned<T> own(void (*release)(T*), Create&& create) {
    T* made = nullptr;
    check(create(&made));
    return Owned<T>(made, release);
}

std::size_t bytes_of(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
            return 4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
            return 8;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return 2;
        default:
            throw std::runtime_error("a type that no bundle has: " + std::to_string(static_cast<int>(type)));
    }
}

struct Facts {
    ONNXTensorElementDataType type;
    std::vector<std::int64_t> shape;
    std::size_t bytes() const { return volume(shape) * bytes_of(type); }
};

Facts facts_of(const OrtTensorTypeAndShapeInfo* info) {
    Facts facts{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
    std::size_t rank = 0;
    check(ort->GetTensorElementType(info, &facts.type));
    check(ort->GetDimensionsCount(info, &rank));
    facts.shape.resize(rank);
    check(ort->GetDimensions(info, facts.shape.data(), rank));
    return facts;
}

std::string take(char* name, OrtAllocator* allocator) {
    std::string taken = name;
    check(ort->AllocatorFree(allocator, name));
    return taken;
}

void run(const std::string& bundle, const std::string& folder, std::int64_t batch) {
    const auto env = own<OrtEnv>(
        ort->ReleaseEnv, [](auto out) { return ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "ort_step", out); });
    const auto options =
        own<OrtSessionOptions>(ort->ReleaseSessionOptions, [](auto out) { return ort->CreateSessionOptions(out); });
    const std::string model = bundle + "/model.onnx";
    const auto session = own<OrtSession>(ort->ReleaseSession, [&](auto out) {
        return ort->CreateSession(env.get(), model.c_str(), options.get(), out);
    });
    const auto memory = own<OrtMemoryInfo>(ort->ReleaseMemoryInfo, [](auto out) {
        return ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out);
    });
    OrtAllocator* allocator = nullptr;  // not ours to release
    check(ort->GetAllocatorWithDefaultOptions(&allocator));

    std::size_t inputs = 0, outputs = 0;
    check(ort->SessionGetInputCount(session.get(), &inputs));
    check(ort->SessionGetOutputCount(session.get(), &outputs));
    std::vector<std::string> input_names, output_names;
    std::vector<std::vector<char>> data;  // what the values point to
    std::vector<Owned<OrtValue>> values;
    for (std::size_t index = 0; index < inputs; ++index) {
        char* name = nullptr;
        check(ort->SessionGetInputName(session.get(), index, allocator, &name));
        input_names.push_back(take(name, allocator));
        const auto type = own<OrtTypeInfo>(ort->ReleaseTypeInfo, [&](auto out) {
            return ort->SessionGetInputTypeInfo(session.get(), index, out);
        });
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // a part of type
        check(ort->CastTypeInfoToTensorInfo(type.get(), &tensor));
        Facts facts = facts_of(tensor);
        for (auto& size : facts.shape) size = size < 0 ? batch : size;
        data.push_back(read_raw(folder, input_names.back(), facts.bytes()));
        values.push_back(own<OrtValue>(ort->ReleaseValue, [&](auto out) {
            return ort->CreateTensorWithDataAsOrtValue(
                memory.get(), data.back().data(), facts.bytes(), facts.shape.data(), facts.shape.size(), facts.type, out);
        }));
    }
    for (std::size_t index = 0; index < outputs; ++index) {
        char* name = nullptr;
        check(ort->SessionGetOutputName(session.get(), index, allocator, &name));
        output_names.push_back(take(name, allocator));
    }

    std::vector<const char*> in, out;
    std::vector<const OrtValue*> given;
    for (const auto& name : input_names) in.push_back(name.c_str());
    for (const auto& name : output_names) out.push_back(name.c_str());
    for (const auto& value : values) given.push_back(value.get());
    std::vector<OrtValue*> results(outputs, nullptr);
    check(ort->Run(session.get(), nullptr, in.data(), given.data(), inputs, out.data(), outputs, results.data()));
    std::vector<Owned<OrtValue>> made;
    for (auto* result : results) made.emplace_back(result, ort->ReleaseValue);
    for (std::size_t index = 0; index < outputs; ++index) {
        const auto info = own<OrtTensorTypeAndShapeInfo>(ort->ReleaseTensorTypeAndShapeInfo, [&](auto to) {
            return ort->GetTensorTypeAndShape(made[index].get(), to);
        });
        void* content = nullptr;
        check(ort->GetTensorMutableData(made[index].get(), &content));
        write_raw(folder, output_names[index], content, facts_of(info.get()).bytes());
        std::printf("%s: %zu values\n", output_names[index].c_str(), volume(facts_of(info.get()).shape));
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "usage: ort_step BUNDLE FOLDER BATCH\n");
        return 2;
    }
    try {
        ort = OrtGetApiBase()->GetApi(API_VERSION);
        if (ort == nullptr) throw std::runtime_error("this ONNX Runtime has no version 1 of its API");
        std::printf("ONNX Runtime %s\n", OrtGetApiBase()->GetVersionString());
        run(arguments[1], arguments[2], parse_batch(arguments[3]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}
