// One evaluation of a bundle's plan with the runtime of TensorRT or TensorRT-RTX.
//
//     trt_step PLAN FOLDER BATCH
//
// Reads FOLDER/NAME.raw for every input of the plan (x, t, y, ...), takes open dimensions to be BATCH, and writes every
// output (out.raw). Deserializing a plan runs code that is in it: check where it comes from first, with
// `dexport info BUNDLE --require-signature KEY.pub.pem`.
//
// NEVER RUN: written where there was no GPU.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace {

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
    }
};

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <typename T>
std::unique_ptr<T> required(T* made, const std::string& what) {
    if (made == nullptr) throw std::runtime_error("TensorRT: no " + what + "; see the messages above");
    return std::unique_ptr<T>(made);
}

std::size_t bytes_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32:
            return 4;
        case nvinfer1::DataType::kINT64:
            return 8;
        case nvinfer1::DataType::kHALF:
        case nvinfer1::DataType::kBF16:
            return 2;
        default:
            throw std::runtime_error("a type that no plan of dexport takes or gives");
    }
}

std::vector<std::int64_t> shape_of(const nvinfer1::Dims& dims) {
    return std::vector<std::int64_t>(dims.d, dims.d + dims.nbDims);
}

using Memory = std::unique_ptr<void, cudaError_t (*)(void*)>;

Memory allocate(std::size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes));
    return Memory(memory, cudaFree);
}

void run(const std::string& plan, const std::string& folder, std::int64_t batch) {
    std::ifstream file(plan, std::ios::binary);
    if (!file) throw std::runtime_error(plan + " cannot be read");
    const std::vector<char> content{std::istreambuf_iterator<char>(file), {}};
    Logger logger;
    const auto runtime = required(nvinfer1::createInferRuntime(logger), "runtime");
    const auto engine = required(runtime->deserializeCudaEngine(content.data(), content.size()), "engine of " + plan);
    const auto context = required(engine->createExecutionContext(), "context");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream));
    const std::unique_ptr<CUstream_st, cudaError_t (*)(cudaStream_t)> owned(stream, cudaStreamDestroy);

    std::vector<std::string> outputs;
    std::vector<Memory> memory;
    std::vector<std::vector<char>> inputs;  // until the copies are done
    for (std::int32_t index = 0; index < engine->getNbIOTensors(); ++index) {
        const char* name = engine->getIOTensorName(index);
        if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kOUTPUT) {
            outputs.emplace_back(name);
            continue;
        }
        nvinfer1::Dims dims = engine->getTensorShape(name);
        for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) dims.d[axis] = dims.d[axis] < 0 ? batch : dims.d[axis];
        if (!context->setInputShape(name, dims)) {
            throw std::runtime_error(std::string(name) + ": this plan was not built for a batch of " + std::to_string(batch));
        }
        inputs.push_back(read_raw(folder, name, volume(shape_of(dims)) * bytes_of(engine->getTensorDataType(name))));
        memory.push_back(allocate(inputs.back().size()));
        check(cudaMemcpyAsync(memory.back().get(), inputs.back().data(), inputs.back().size(), cudaMemcpyHostToDevice, stream));
        if (!context->setTensorAddress(name, memory.back().get())) throw std::runtime_error(std::string(name) + " has no place");
    }
    // Outputs have shapes once every input has one.
    std::vector<std::vector<char>> results;
    const std::size_t first = memory.size();
    for (const auto& name : outputs) {
        const auto shape = shape_of(context->getTensorShape(name.c_str()));
        results.emplace_back(volume(shape) * bytes_of(engine->getTensorDataType(name.c_str())));
        memory.push_back(allocate(results.back().size()));
        if (!context->setTensorAddress(name.c_str(), memory.back().get())) throw std::runtime_error(name + " has no place");
    }
    if (!context->enqueueV3(stream)) throw std::runtime_error("TensorRT: the plan did not run; see the messages above");
    for (std::size_t index = 0; index < outputs.size(); ++index) {
        auto& result = results[index];
        check(cudaMemcpyAsync(result.data(), memory[first + index].get(), result.size(), cudaMemcpyDeviceToHost, stream));
    }
    check(cudaStreamSynchronize(stream));
    for (std::size_t index = 0; index < outputs.size(); ++index) {
        write_raw(folder, outputs[index], results[index].data(), results[index].size());
        std::printf("%s: %zu bytes\n", outputs[index].c_str(), results[index].size());
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "usage: trt_step PLAN FOLDER BATCH\n");
        return 2;
    }
    try {
        run(arguments[1], arguments[2], parse_batch(arguments[3]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}
