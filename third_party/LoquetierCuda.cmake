# Decides whether the CUDA backend is built, and finds what it takes: sets LOQUETIER_WITH_CUDA and LoquetierCuda_* for LoquetierCudaLibrary.cmake.
#
# The toolkit (12.8 or newer: nvcc, the CUDA runtime, cuBLASLt), the cuDNN headers, and the headers of cudnn-frontend and CUTLASS come from
#   LOQUETIER_CUDA_WHEELS   a site-packages folder with the PyPI packages nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime,
#                           nvidia-cuda-cccl, nvidia-cublas, nvidia-cudnn-cu13, nvidia-cudnn-frontend, nvidia-cutlass (4.2;
#                           its headers alone: pip install --no-deps); default: that of the Python which drives the build. The headers of these
#                           two may also be named by LOQUETIER_CUDNN_FRONTEND_DIR and LOQUETIER_CUTLASS_DIR. What is lacking is looked for in
#   LOQUETIER_CUDA_TOOLKIT  an installed toolkit; default: where nvcc of the PATH lies, or /usr/local/cuda, and the system's folders.
# With LOQUETIER_CUDA=AUTO a missing piece switches the backend off and is named; with ON it is an error.
set(LOQUETIER_CUDA_ARCH 90a CACHE STRING "GPU architectures of the CUDA backend, as nvcc's compute_/sm_ suffixes, separated by ;")
set(LOQUETIER_CUDA_WHEELS "" CACHE PATH "site-packages folder with NVIDIA's PyPI packages")
set(LOQUETIER_CUDA_TOOLKIT "" CACHE PATH "An installed CUDA toolkit")
set(LOQUETIER_WITH_CUDA OFF)
if(NOT LOQUETIER_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LOQUETIER_CUDA: expected AUTO, ON or OFF, got \"${LOQUETIER_CUDA}\"")
endif()
if(LOQUETIER_CUDA STREQUAL "OFF")
  return()
endif()

set(LoquetierCuda_wheels "${LOQUETIER_CUDA_WHEELS}")
if(NOT LoquetierCuda_wheels)
  loquetier_python_package(nvidia LoquetierCuda_nvidia)
  if(LoquetierCuda_nvidia)
    get_filename_component(LoquetierCuda_wheels "${LoquetierCuda_nvidia}" DIRECTORY)
  endif()
endif()
set(LoquetierCuda_roots)
if(LoquetierCuda_wheels)
  list(APPEND LoquetierCuda_roots "${LoquetierCuda_wheels}/nvidia/cu13" "${LoquetierCuda_wheels}/nvidia/cudnn" "${LoquetierCuda_wheels}")
endif()
find_program(LoquetierCuda_NVCC nvcc HINTS ${LoquetierCuda_roots} "${LOQUETIER_CUDA_TOOLKIT}" PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(LOQUETIER_CUDA_TOOLKIT)
  list(APPEND LoquetierCuda_roots "${LOQUETIER_CUDA_TOOLKIT}")
endif()
list(APPEND LoquetierCuda_roots /usr/local/cuda)

find_path(LoquetierCuda_RUNTIME_INCLUDE cuda_runtime.h HINTS ${LoquetierCuda_roots} PATH_SUFFIXES include)
find_path(LoquetierCuda_CUBLAS_INCLUDE cublasLt.h HINTS ${LoquetierCuda_roots} PATH_SUFFIXES include)
find_path(LoquetierCuda_CUDNN_INCLUDE cudnn.h HINTS ${LoquetierCuda_roots} PATH_SUFFIXES include)
find_path(LoquetierCuda_FRONTEND_INCLUDE cudnn_frontend.h HINTS ${LOQUETIER_CUDNN_FRONTEND_DIR} ${LoquetierCuda_roots} PATH_SUFFIXES include)
if(NOT LoquetierCuda_FRONTEND_INCLUDE)  # the wheel puts its headers in site-packages/include
  loquetier_python_files(nvidia-cudnn-frontend "include/cudnn_frontend\\.h$" LoquetierCuda_frontend_header)
  if(LoquetierCuda_frontend_header)
    get_filename_component(LoquetierCuda_frontend_dir "${LoquetierCuda_frontend_header}" DIRECTORY)
    find_path(LoquetierCuda_FRONTEND_INCLUDE cudnn_frontend.h PATHS ${LoquetierCuda_frontend_dir} NO_DEFAULT_PATH)
  endif()
endif()
find_path(LoquetierCuda_CUTLASS_INCLUDE cutlass/cutlass.h HINTS ${LOQUETIER_CUTLASS_DIR} ${LoquetierCuda_roots}
  PATH_SUFFIXES include cutlass_library/source/include)
if(NOT LoquetierCuda_CUTLASS_INCLUDE)  # of the Python which drives the build, beside a toolkit from elsewhere
  loquetier_python_package(cutlass_library LoquetierCuda_cutlass_library)
  if(LoquetierCuda_cutlass_library)
    find_path(LoquetierCuda_CUTLASS_INCLUDE cutlass/cutlass.h PATHS ${LoquetierCuda_cutlass_library}/source/include NO_DEFAULT_PATH)
  endif()
endif()
# NVIDIA's wheels hold versioned names only.
find_library(LoquetierCuda_CUDART NAMES libcudart.so libcudart.so.13 libcudart.so.12 NAMES_PER_DIR HINTS ${LoquetierCuda_roots} PATH_SUFFIXES lib lib64)
find_library(LoquetierCuda_CUBLASLT NAMES libcublasLt.so libcublasLt.so.13 libcublasLt.so.12 NAMES_PER_DIR HINTS ${LoquetierCuda_roots} PATH_SUFFIXES lib lib64)

set(LoquetierCuda_missing)
foreach(piece IN ITEMS NVCC RUNTIME_INCLUDE CUBLAS_INCLUDE CUDNN_INCLUDE FRONTEND_INCLUDE CUTLASS_INCLUDE CUDART CUBLASLT)
  if(NOT LoquetierCuda_${piece})
    list(APPEND LoquetierCuda_missing ${piece})
  endif()
endforeach()
if(NOT LoquetierCuda_missing)
  set(LOQUETIER_WITH_CUDA ON)
  message(STATUS "CUDA backend: on, ${LoquetierCuda_NVCC}, architectures ${LOQUETIER_CUDA_ARCH}")
elseif(LOQUETIER_CUDA STREQUAL "ON")
  list(JOIN LoquetierCuda_missing ", " LoquetierCuda_missing)
  message(FATAL_ERROR "LOQUETIER_CUDA=ON, but not found: ${LoquetierCuda_missing} (see third_party/LoquetierCuda.cmake for the packages)")
else()
  list(JOIN LoquetierCuda_missing ", " LoquetierCuda_missing)
  message(STATUS "CUDA backend: off, not found: ${LoquetierCuda_missing}")
endif()
