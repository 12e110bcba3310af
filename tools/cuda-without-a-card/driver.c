// A stand-in for CUDA's driver on a machine without a card: memory is the host's, and a launch does nothing. What is real is NVRTC: every kernel
// that a program launches is compiled, and its PTX is written to $PTX_DIR. Results are meaningless.
//
// COMPUTE_CAPABILITY (90) says for which card; with TRACE set, launches are written to standard error.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 801 };

typedef struct {
  int id;
  char name[256];
} Kernel;

static const size_t MEMORY = (size_t)12 << 30;

static int capability(void) {
  const char *text = getenv("COMPUTE_CAPABILITY");
  return text ? atoi(text) : 90;
}
static int max_shared(void) { return capability() >= 90 ? 232448 : 166912; }

// Handles only have to differ.
static void *handle(void) {
  static uintptr_t last = 0x1000;
  return (void *)__sync_add_and_fetch(&last, 16);
}

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, OK; }
CUresult cuDeviceGet(int *device, int ordinal) { return *device = ordinal, OK; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, OK; }
CUresult cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "no card"), OK; }
CUresult cuDeviceGetUuid(void *uuid, int device) { return memset(uuid, 1, 16), OK; }
CUresult cuDeviceGetUuid_v2(void *uuid, int device) { return memset(uuid, 1, 16), OK; }
CUresult cuDeviceGetLuid(char *luid, unsigned *mask, int device) { return NOT_SUPPORTED; }
CUresult cuDeviceGetPCIBusId(char *id, int size, int device) { return snprintf(id, size, "0000:00:01.0"), OK; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = MEMORY, OK; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 1: case 2: case 3: *value = 1024; break;           // threads a block, and along x and y
  case 4: *value = 64; break;                             // along z
  case 5: *value = 2147483647; break;                     // blocks along x
  case 6: case 7: *value = 65535; break;                  // along y and z
  case 8: *value = 49152; break;                          // shared memory a block
  case 10: *value = 32; break;                            // threads a warp
  case 12: *value = 65536; break;                         // registers a block
  case 16: *value = 132; break;                           // multiprocessors
  case 39: *value = 2048; break;                          // threads a multiprocessor
  case 75: *value = capability() / 10; break;
  case 76: *value = capability() % 10; break;
  case 97: *value = max_shared(); break;                  // shared memory a block that asks for more
  case 41: case 115: *value = 1; break;                   // unified addresses, memory pools
  default: *value = 0;
  }
  return OK;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { return *context = handle(), OK; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
CUresult cuCtxSetCurrent(void *context) { return OK; }
CUresult cuCtxGetCurrent(void **context) { return *context = handle(), OK; }
CUresult cuCtxSynchronize(void) { return OK; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, OK; }
CUresult cuStreamCreate(void **stream, unsigned flags) { return *stream = handle(), OK; }
CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return *stream = handle(), OK; }
CUresult cuStreamDestroy_v2(void *stream) { return OK; }
CUresult cuStreamSynchronize(void *stream) { return OK; }
CUresult cuStreamQuery(void *stream) { return OK; }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return OK; }
CUresult cuStreamIsCapturing(void *stream, int *status) { return *status = 0, OK; }
CUresult cuEventCreate(void **event, unsigned flags) { return *event = handle(), OK; }
CUresult cuEventRecord(void *event, void *stream) { return OK; }
CUresult cuEventSynchronize(void *event) { return OK; }
CUresult cuEventQuery(void *event) { return OK; }
CUresult cuEventElapsedTime(float *milliseconds, void *start, void *end) { return *milliseconds = 20, OK; }
CUresult cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) { return *milliseconds = 20, OK; }
CUresult cuEventDestroy_v2(void *event) { return OK; }

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
  void *memory;
  if (posix_memalign(&memory, 512, bytes ? bytes : 512))
    return OUT_OF_MEMORY;
  return *pointer = (CUdeviceptr)memset(memory, 0, bytes), OK;
}
CUresult cuMemAllocAsync(CUdeviceptr *pointer, size_t bytes, void *stream) { return cuMemAlloc_v2(pointer, bytes); }
CUresult cuMemFree_v2(CUdeviceptr pointer) { return free((void *)pointer), OK; }
CUresult cuMemFreeAsync(CUdeviceptr pointer, void *stream) { return cuMemFree_v2(pointer); }
CUresult cuMemAllocHost_v2(void **pointer, size_t bytes) { return *pointer = calloc(1, bytes), OK; }
CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) { return *pointer = calloc(1, bytes), OK; }
CUresult cuMemFreeHost(void *pointer) { return free(pointer), OK; }
CUresult cuMemGetInfo_v2(size_t *idle, size_t *total) { return *idle = *total = MEMORY, OK; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *stream) {
  return memcpy((void *)to, from, bytes), OK;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *stream) {
  return memcpy(to, (void *)from, bytes), OK;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void *stream) {
  return memmove((void *)to, (void *)from, bytes), OK;
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, void *stream) {
  return memset((void *)to, value, bytes), OK;
}
// One side of a CUDA_MEMCPY2D; type 1 is the host.
typedef struct {
  size_t x, y;
  unsigned type;
  void *host;
  CUdeviceptr device;
  void *array;
  size_t pitch;
} Side;
typedef struct {
  Side from, to;
  size_t width, height;
} Copy;
static char *row(const Side *side, size_t y) {
  return (side->type == 1 ? (char *)side->host : (char *)side->device) + (y + side->y) * side->pitch + side->x;
}
CUresult cuMemcpy2DAsync_v2(const Copy *copy, void *stream) {
  for (size_t y = 0; y < copy->height; y++)
    memcpy(row(&copy->to, y), row(&copy->from, y), copy->width);
  return OK;
}

CUresult cuModuleLoadData(void **module, const void *ptx) {
  static int modules = 0;
  Kernel *kernel = calloc(1, sizeof(Kernel));
  kernel->id = __sync_add_and_fetch(&modules, 1);
  const char *folder = getenv("PTX_DIR");
  if (folder) {
    char path[512];
    snprintf(path, sizeof path, "%s/%d-%d.ptx", folder, (int)getpid(), kernel->id);
    FILE *file = fopen(path, "w");
    if (file)
      fputs(ptx, file), fclose(file);
  }
  return *module = kernel, OK;
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  snprintf(((Kernel *)module)->name, sizeof((Kernel *)0)->name, "%s", name);
  return *function = module, OK;
}
CUresult cuModuleUnload(void *module) { return OK; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) {
  return attribute == 8 && value > max_shared() ? INVALID_VALUE : OK;
}
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = 0, OK; }
CUresult cuLaunchKernel(Kernel *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, void *stream, void **arguments, void **extra) {
  int fits = grid_x && grid_y && grid_z && grid_y <= 65535 && grid_z <= 65535 && block_x && block_y && block_z &&
             block_z <= 64 && block_x * block_y * block_z <= 1024;
  if (!fits || getenv("TRACE"))
    fprintf(stderr, "%s %d %s grid %u %u %u block %u %u %u shared %u\n", fits ? "LAUNCH" : "REFUSED", kernel->id, kernel->name,
            grid_x, grid_y, grid_z, block_x, block_y, block_z, shared);
  return fits ? OK : INVALID_VALUE;
}
CUresult cuTensorMapEncodeTiled(void *map) { return OK; }
CUresult cuTensorMapEncodeIm2col(void *map) { return OK; }
CUresult cuTensorMapEncodeIm2colWide(void *map) { return OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "refused by the stand-in driver", OK; }
CUresult cuGetErrorName(CUresult error, const char **text) { return *text = "STAND_IN", OK; }
CUresult cuDeviceGetDefaultMemPool(void **pool, int device) { return *pool = handle(), OK; }
CUresult cuMemPoolSetAttribute(void *pool, int attribute, void *value) { return OK; }
CUresult cuMemPoolGetAttribute(void *pool, int attribute, void *value) { return OK; }
CUresult cuMemPoolTrimTo(void *pool, size_t bytes) { return OK; }
