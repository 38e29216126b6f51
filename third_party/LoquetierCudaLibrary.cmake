# The CUDA backend as a library of its own, loquetier_cuda, which cpp/ops/cuda_loader.cpp loads when a CUDA device is asked for.
#
# nvcc is called directly, one command per .cu: CMake's CUDA language wants to link a test program at configure time, which the toolkit made
# of PyPI packages (libraries with versioned names only) does not do, and needs no more here than an object file with its dependencies.
set(loquetier_cuda_gencode)
foreach(arch IN LISTS LOQUETIER_CUDA_ARCH)
  list(APPEND loquetier_cuda_gencode -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
set(loquetier_cuda_includes)
foreach(folder IN ITEMS ${LoquetierCuda_FRONTEND_INCLUDE} ${LoquetierCuda_CUDNN_INCLUDE} ${LoquetierCuda_CUBLAS_INCLUDE}
    ${LoquetierCuda_RUNTIME_INCLUDE} ${LoquetierCuda_RUNTIME_INCLUDE}/cccl)
  list(APPEND loquetier_cuda_includes -isystem ${folder})
endforeach()
set(loquetier_cuda_werror)
if(LOQUETIER_WERROR)
  set(loquetier_cuda_werror -Werror=all-warnings)
endif()

set(loquetier_cuda_objects)
foreach(name IN ITEMS adamw attention_decode attention_plain elementwise linear_decode lora_decode lora_fused_bf16 lora_fused_f16 lora_fused_pack
    lora_grad lora_reduce lora_spread lora_tall lora_wide loss norm rope sampling)
  set(source ${PROJECT_SOURCE_DIR}/cuda/${name}.cu)
  set(object ${PROJECT_BINARY_DIR}/cuda/${name}.cu.o)
  set(options ${loquetier_cuda_gencode})
  if(name MATCHES "^lora_fused_.*f16$")  # wgmma exists for this architecture alone; the backend runs on no other
    set(options -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -isystem ${LoquetierCuda_CUTLASS_INCLUDE})
  endif()
  add_custom_command(OUTPUT ${object}
    COMMAND ${LoquetierCuda_NVCC} -std=c++20 -O3 ${options} -lineinfo --extended-lambda ${loquetier_cuda_werror}
      -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler=-fPIC,-Wall,-Wextra -I ${PROJECT_SOURCE_DIR}/cpp -I ${PROJECT_SOURCE_DIR}/cpp/include
      -I ${PROJECT_SOURCE_DIR}/cuda ${loquetier_cuda_includes} -MD -MF ${object}.d -c ${source} -o ${object}
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "nvcc cuda/${name}.cu" VERBATIM)
  list(APPEND loquetier_cuda_objects ${object})
endforeach()
file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/cuda)

add_library(loquetier_cuda SHARED cuda/attention.cpp cuda/attention_cudnn.cpp cuda/device.cpp cuda/fused_linear.cpp cuda/graph.cpp
  cuda/linear.cpp cuda/lora_call.cpp cuda/tensor_maps.cpp ${loquetier_cuda_objects})
set_source_files_properties(${loquetier_cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
target_include_directories(loquetier_cuda PRIVATE cuda cpp)
target_include_directories(loquetier_cuda SYSTEM PRIVATE ${LoquetierCuda_FRONTEND_INCLUDE} ${LoquetierCuda_CUDNN_INCLUDE}
  ${LoquetierCuda_CUBLAS_INCLUDE} ${LoquetierCuda_RUNTIME_INCLUDE})
target_link_libraries(loquetier_cuda PRIVATE loquetier loquetier_flags ${LoquetierCuda_CUDART} ${LoquetierCuda_CUBLASLT} ${CMAKE_DL_LIBS})
target_link_options(loquetier_cuda PRIVATE LINKER:-z,defs)
# From site-packages/loquetier_core/lib to the wheels of loquetier-core[cuda]; an installed toolkit is found by its own folder.
set(loquetier_cuda_rpath "$ORIGIN" "$ORIGIN/../../nvidia/cu13/lib" "$ORIGIN/../../nvidia/cudnn/lib")
foreach(library IN ITEMS ${LoquetierCuda_CUDART} ${LoquetierCuda_CUBLASLT})
  get_filename_component(folder ${library} DIRECTORY)
  if(NOT folder MATCHES "site-packages")
    list(APPEND loquetier_cuda_rpath ${folder})
  endif()
endforeach()
list(REMOVE_DUPLICATES loquetier_cuda_rpath)
set_target_properties(loquetier_cuda PROPERTIES INSTALL_RPATH "${loquetier_cuda_rpath}")
install(TARGETS loquetier_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
