# Decides whether the CUDA backend is built, and enables the language: sets LOQUETIER_WITH_CUDA and LOQUETIER_CUDA_WHEELS.
# A toolkit is looked for in this order: CMAKE_CUDA_COMPILER, CUDACXX, nvcc of the PATH or /usr/local/cuda, and nvidia-cuda-nvcc from PyPI
# (site-packages/nvidia/cu13, together with nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime, nvidia-cuda-cccl, nvidia-cublas, nvidia-cudnn-cu13).
set(LOQUETIER_WITH_CUDA OFF)
set(LOQUETIER_CUDA_ROOT "")  # of the wheels, when they are the toolkit
if(NOT LOQUETIER_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LOQUETIER_CUDA: expected AUTO, ON or OFF, got \"${LOQUETIER_CUDA}\"")
endif()
