# AArch64 Linux, statically linked, by the compiler that comes with zig (`pip install ziglang` or a zig on the PATH).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(ZIG NAMES zig python-zig REQUIRED)
set(CMAKE_CXX_COMPILER ${ZIG} c++ -target aarch64-linux-musl)
