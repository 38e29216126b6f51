# nlohmann/json, header-only, used inside the library only: target NlohmannJson::json. Taken from NLOHMANN_JSON_DIR (a folder that
# holds nlohmann/json.hpp), the nlohmann-json package from PyPI, or the system.
if(NOT NLOHMANN_JSON_DIR)
  loquetier_python_package(nlohmann_json NlohmannJson_package)
  if(NlohmannJson_package)
    set(NLOHMANN_JSON_DIR ${NlohmannJson_package}/include)
  endif()
endif()
find_path(NlohmannJson_INCLUDE_DIR nlohmann/json.hpp HINTS ${NLOHMANN_JSON_DIR})
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NlohmannJson REQUIRED_VARS NlohmannJson_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "pip install nlohmann-json, or install nlohmann-json3-dev, or pass -DNLOHMANN_JSON_DIR=…")
if(NlohmannJson_FOUND AND NOT TARGET NlohmannJson::json)
  add_library(NlohmannJson::json INTERFACE IMPORTED)
  set_target_properties(NlohmannJson::json PROPERTIES INTERFACE_INCLUDE_DIRECTORIES ${NlohmannJson_INCLUDE_DIR}
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${NlohmannJson_INCLUDE_DIR})
endif()
