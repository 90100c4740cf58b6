# Read by the build of llama-cpp-python (see tools/install.py). Its wheel does not hold llama.cpp's helper library for
# command line programs, which would take half the time of the build. It asks for it by a cache entry; a plain variable
# of the same name goes before that.
set(LLAMA_BUILD_COMMON OFF)

# A build for the machine it runs on uses Intel's AMX where there is one. gcc 12 loads the tiles' settings from memory
# that it has not written, and the first answer ends the process (llama.cpp issue 20824): the kernels beside it do.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag("-mno-amx-int8 -mno-amx-tile" FTNB_KNOWS_AMX)
if(FTNB_KNOWS_AMX)
    add_compile_options(-mno-amx-int8 -mno-amx-tile)
endif()
