# Read by the build of llama-cpp-python (see tools/install.py). Its wheel does not hold llama.cpp's helper library for
# command line programs, which would take half the time of the build. It asks for it by a cache entry; a plain variable
# of the same name goes before that.
set(LLAMA_BUILD_COMMON OFF)
