# Where installed Python packages lie. loquetier_python_package(<module> <variable>) sets <variable> to the folder of a package or
# namespace package of the interpreter that drives the build (in pip's isolated build: its build requirements), or to "".
# loquetier_python_files(<distribution> <regex> <variable>): files of a distribution whose recorded path matches.
if(NOT Python_EXECUTABLE)
  find_package(Python 3.10 COMPONENTS Interpreter QUIET)
endif()

function(loquetier_python_package module variable)
  set(folder "")
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util, sys\nspec = importlib.util.find_spec(sys.argv[1])\nprint(list(spec.submodule_search_locations)[0] if spec and spec.submodule_search_locations else '', end='')"
        ${module}
      OUTPUT_VARIABLE folder ERROR_QUIET RESULT_VARIABLE status)
    if(NOT status EQUAL 0)
      set(folder "")
    endif()
  endif()
  set(${variable} "${folder}" PARENT_SCOPE)
endfunction()

function(loquetier_python_files distribution regex variable)
  set(files "")
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.metadata as m, re, sys\nfound = [str(f.locate()) for f in m.files(sys.argv[1]) or [] if re.search(sys.argv[2], str(f))]\nprint(';'.join(found), end='')"
        ${distribution} ${regex}
      OUTPUT_VARIABLE files ERROR_QUIET RESULT_VARIABLE status)
    if(NOT status EQUAL 0)
      set(files "")
    endif()
  endif()
  set(${variable} "${files}" PARENT_SCOPE)
endfunction()
