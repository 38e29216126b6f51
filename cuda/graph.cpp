// Recording a step's launches into a CUDA graph. Only this thread is watched for calls that a recording forbids, so others may
// allocate meanwhile; what the recorded ops themselves make at first use (plans, algorithms, scratch) must be there before.
#include "core/check.h"
#include "cuda_check.h"
#include "cuda_ops.h"

namespace loquetier::cuda {

namespace {

class CudaGraph final : public StepGraph {
 public:
  CudaGraph(CudaDevice& device, cudaGraph_t graph) : device_(device) {
    check(cudaGraphInstantiate(&executable_, graph, 0), "cudaGraphInstantiate");
    const cudaError_t uploaded = cudaGraphUpload(executable_, device_.stream());
    if (uploaded != cudaSuccess) cudaGraphExecDestroy(executable_);
    check(uploaded, "cudaGraphUpload");
  }
  // A replay may still be under way; it is waited for by the driver.
  ~CudaGraph() override { cudaGraphExecDestroy(executable_); }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  void launch() override {
    device_.use();
    check(cudaGraphLaunch(executable_, device_.stream()), "cudaGraphLaunch");
  }

 private:
  CudaDevice& device_;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace

std::unique_ptr<StepGraph> CudaOps::capture(const std::function<void()>& work) {
  if (launches_are_synchronized()) return nullptr;
  device_.use();
  check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream(), &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    (void)cudaGetLastError();  // the capture's own complaint
    throw;
  }
  check(cudaStreamEndCapture(stream(), &graph), "cudaStreamEndCapture");
  const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(&cudaGraphDestroy)> recorded(graph, &cudaGraphDestroy);
  return std::make_unique<CudaGraph>(device_, graph);
}

}  // namespace loquetier::cuda
