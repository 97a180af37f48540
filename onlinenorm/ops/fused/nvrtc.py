"""CUDA C++ at run time: NVRTC from torch's wheels compiles, the driver launches; no compiler has to be installed."""

import ctypes
import functools
import sys
from pathlib import Path

import torch

SHARED_MEMORY_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAP_UINT16 = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16
COOPERATIVE, PROGRAMMATIC = 2, 6  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE, ..._PROGRAMMATIC_STREAM_SERIALIZATION
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
MAP_PROMOTE_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The compiler library: where the loader finds it, else in the wheels that torch depends on."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    for folder in (
        "",
        *(str(path.parent) + "/" for path in Path(torch.__file__).parents[1].glob(f"nvidia/*/*/{name}")),
    ):
        try:
            return ctypes.CDLL(folder + name)
        except OSError:
            continue
    raise RuntimeError(f"{name} not found; it comes with torch's CUDA wheels (package nvidia-cuda-nvrtc)")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def driver_has(name: str) -> bool:
    """Whether the driver is new enough to have a function of this name."""
    return hasattr(_driver(), name)


def call_driver(name: str, *arguments) -> None:
    """Call a function of the driver; raises RuntimeError with the driver's words.

    A thread of the autograd engine that has called nothing of CUDA yet has no context: it gets torch's.
    """
    function = getattr(_driver(), name)
    status = function(*arguments)
    if status == INVALID_CONTEXT:
        _use_primary_context()
        status = function(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver error {status} of {name}: {(text.value or b'unknown').decode()}")


def _use_primary_context() -> None:
    """Make the context that torch shares with every user of its current device this thread's own."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _driver().cuDeviceGet(ctypes.byref(device), torch.cuda.current_device())
    _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    _driver().cuCtxSetCurrent(context)


def architecture(major: int, minor: int) -> str | None:
    """What to compile for a device of this capability: the newest of its generation that it and the compiler know.

    None where the compiler knows none, or is not there.
    """
    try:
        nvrtc, count = _nvrtc(), ctypes.c_int()
    except RuntimeError:
        return None
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    fitting = [number for number in known if number // 10 == major and number % 10 <= minor]
    return f"sm_{max(fitting)}" if fitting else None


def compiler_version() -> tuple[int, int, str]:
    """NVRTC's major and minor version, and that of torch, which names the very release it wants."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value, torch.__version__


def compile_source(source: str, architecture: str, options: tuple[str, ...]) -> bytes:
    """Machine code of ``source`` for an architecture such as "sm_90".

    Raises RuntimeError with the compiler's log.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    flags = [f"--gpu-architecture={architecture}", *options]
    encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"single_read.cu", 0, None, None)
    assert status == 0, f"nvrtcCreateProgram: {status}"
    try:
        failed, size = nvrtc.nvrtcCompileProgram(program, len(flags), encoded), ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC failed ({failed}):\n{log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.lru_cache(4096)
def tensor_map(address: int, rows: int, columns: int, box_rows: int, box_columns: int) -> bytes:
    """Descriptor by which TMA reads boxes of a (rows, columns) matrix of 16-bit values; rows past the end
    read as zeros."""
    room = ctypes.create_string_buffer(128 + 63)
    aligned = (ctypes.addressof(room) + 63) // 64 * 64
    call_driver(
        "cuTensorMapEncodeTiled", ctypes.c_void_p(aligned), MAP_UINT16, 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * columns),
        (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1),
        0, 0, MAP_PROMOTE_256, 0,
    )  # fmt: skip
    return ctypes.string_at(aligned, 128)


def capture_of(stream: int) -> int:
    """Number of the graph that ``stream`` is being captured into; differs from that of every other graph."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    call_driver(
        "cuStreamGetCaptureInfo_v2",
        *(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None),
    )
    return number.value


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of a whole number."""

    _fields_ = ("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)


class _Config(ctypes.Structure):
    """CUlaunchConfig: grid, CTA and shared memory; stream; attributes."""

    _fields_ = (
        ("shape", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """One function of a compiled module, loaded on the current device."""

    starts_early = True  # where the kernel in front of it has no more CTAs to begin

    def __init__(self, code: bytes, name: str):
        self._module, self._function, self._shared_memory = ctypes.c_void_p(), ctypes.c_void_p(), 0
        call_driver("cuModuleLoadData", ctypes.byref(self._module), code)
        call_driver("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        self._early = driver_has("cuGraphAddDependencies_v2")  # CUDA 12.3: graphs can hold such launches

    @property
    def function(self) -> int:
        """The driver's handle of it."""
        return self._function.value or 0

    def allow_shared_memory(self, size: int) -> None:
        """Raise the limit of a launch's dynamic shared memory to ``size`` bytes at least."""
        if size > self._shared_memory:
            call_driver("cuFuncSetAttribute", self._function, SHARED_MEMORY_LIMIT, size)
            self._shared_memory = size

    def ctas_per_multiprocessor(self, threads: int, shared_memory: int) -> int:
        ctas = ctypes.c_int()
        call_driver(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            *(ctypes.byref(ctas), self._function, threads, ctypes.c_size_t(shared_memory)),
        )
        return ctas.value

    def launch(
        self, ctas: int, threads: int, shared_memory: int, stream: int, parameters: ctypes.Structure, cooperative: bool
    ) -> None:
        """Queue the kernel on ``stream``; its one argument is the structure, by value.

        With ``cooperative`` no CTA begins before all can run at once; the driver refuses more CTAs than that. Otherwise
        CTAs may begin before the kernel in front of this one has ended, and must wait for it (griddepcontrol.wait).
        """
        early = self.starts_early and self._early
        attribute = _Attribute(COOPERATIVE if cooperative else PROGRAMMATIC, value=cooperative or early)
        config = _Config((ctas, 1, 1, threads, 1, 1, shared_memory), stream, ctypes.pointer(attribute), 1)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        call_driver("cuLaunchKernelEx", ctypes.byref(config), self._function, arguments, None)
