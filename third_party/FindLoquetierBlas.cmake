# The CBLAS that the CPU backend calls for large products: target LoquetierBlas::blas.
#   LOQUETIER_BLAS=wheel   the scipy-openblas32 package from PyPI; its symbols carry the prefix scipy_ (LOQUETIER_BLAS_PREFIXED=1), so it
#                          never meets another BLAS of the process. The library is copied beside ours (LoquetierBlas_BUNDLE).
#   LOQUETIER_BLAS=system  CMake's FindBLAS (choose with BLA_VENDOR) with cblas.h.
set(LoquetierBlas_BUNDLE OFF)
if(LOQUETIER_BLAS STREQUAL "wheel")
  if(NOT LOQUETIER_OPENBLAS_DIR)
    loquetier_python_package(scipy_openblas32 LOQUETIER_OPENBLAS_DIR)
  endif()
  find_library(LoquetierBlas_LIBRARY scipy_openblas PATHS ${LOQUETIER_OPENBLAS_DIR}/lib NO_DEFAULT_PATH)
  find_path(LoquetierBlas_INCLUDE_DIR cblas.h PATHS ${LOQUETIER_OPENBLAS_DIR}/include NO_DEFAULT_PATH)
  loquetier_python_files(scipy-openblas32 "licenses/LICENSE" LoquetierBlas_LICENSE)
  include(FindPackageHandleStandardArgs)
  find_package_handle_standard_args(LoquetierBlas
    REQUIRED_VARS LoquetierBlas_LIBRARY LoquetierBlas_INCLUDE_DIR LoquetierBlas_LICENSE
    REASON_FAILURE_MESSAGE "pip install scipy-openblas32 for the Python that CMake finds (or name one with -DPython_EXECUTABLE=…), or use -DLOQUETIER_BLAS=system")
  if(LoquetierBlas_FOUND AND NOT TARGET LoquetierBlas::blas)
    set(LoquetierBlas_BUNDLE ON)
    add_library(LoquetierBlas::blas SHARED IMPORTED)
    set_target_properties(LoquetierBlas::blas PROPERTIES
      IMPORTED_LOCATION ${LoquetierBlas_LIBRARY}
      INTERFACE_INCLUDE_DIRECTORIES ${LoquetierBlas_INCLUDE_DIR}
      INTERFACE_COMPILE_DEFINITIONS LOQUETIER_BLAS_PREFIXED=1)
  endif()
elseif(LOQUETIER_BLAS STREQUAL "system")
  find_package(BLAS REQUIRED)
  find_path(LoquetierBlas_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas ${CMAKE_LIBRARY_ARCHITECTURE} x86_64-linux-gnu aarch64-linux-gnu)
  include(FindPackageHandleStandardArgs)
  find_package_handle_standard_args(LoquetierBlas REQUIRED_VARS LoquetierBlas_INCLUDE_DIR BLAS_LIBRARIES
    REASON_FAILURE_MESSAGE "install a CBLAS with its header (Debian: libopenblas-dev)")
  if(LoquetierBlas_FOUND AND NOT TARGET LoquetierBlas::blas)
    add_library(LoquetierBlas::blas INTERFACE IMPORTED)
    target_link_libraries(LoquetierBlas::blas INTERFACE BLAS::BLAS)
    target_include_directories(LoquetierBlas::blas INTERFACE ${LoquetierBlas_INCLUDE_DIR})
  endif()
else()
  message(FATAL_ERROR "LOQUETIER_BLAS: expected wheel or system, got \"${LOQUETIER_BLAS}\"")
endif()
