/* A CUDA device that computes nothing, for testing everything but the numbers without a GPU.
 *
 * Loaded with LD_PRELOAD in front of libcudart, libcuda, libcublas and libnccl. Memory is host memory (reserved, not
 * committed until it is touched), copies from and to the host are real, kernels do nothing. The sizes and limits are those
 * of an H200. What must not happen during the capture of a graph fails here as it does on a device.
 *
 * The functions of these libraries that torch imports and that are not defined here return 0 (device.py writes them).
 * NULLGPU_COUNT=FILE writes launches, stream synchronizations and the peak of allocated bytes to FILE at exit.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, INVALID_CONFIGURATION = 9, INVALID_DEVICE = 101, CAPTURE_UNSUPPORTED = 900 };
enum { HOST = 1, DEVICE = 2 };  /* the values of cudaMemoryType */

static const size_t TOTAL = 139ull << 30;
static const size_t LARGE = 1 << 16;  /* copies inside the device above this size are left out: they only take time */
static const int SMS = 132, SHARED_PER_BLOCK = 232448, MAX_THREADS = 1024, MAX_GRID_YZ = 65535;

static void *handle(void) { return calloc(1, 64); }

/* Memory ----------------------------------------------------------------------------------------------------------- */
typedef struct { char *start; size_t size; int kind; } Region;
static Region regions[1 << 16];
static int region_count;
static size_t used, peak;
static long launches, synchronizations;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *reserve(size_t size, int kind) {
    size = size ? size : 1;
    void *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return 0;
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < region_count && regions[i].start) i++;
    if (i == region_count) region_count++;
    regions[i] = (Region){p, size, kind};
    if (kind == DEVICE && (used += size) > peak) peak = used;
    pthread_mutex_unlock(&lock);
    return p;
}

static void release(void *p) {
    pthread_mutex_lock(&lock);
    for (int i = 0; p && i < region_count; i++)
        if (regions[i].start == p) {
            munmap(p, regions[i].size);
            if (regions[i].kind == DEVICE) used -= regions[i].size;
            regions[i].start = 0;
            break;
        }
    pthread_mutex_unlock(&lock);
}

static int kind_of(const void *address) {
    const char *a = address;
    int kind = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < region_count && !kind; i++)
        if (regions[i].start && a >= regions[i].start && a < regions[i].start + regions[i].size) kind = regions[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

static int capturing;
static cudaStream_t capturing_stream;

cudaError_t cudaMalloc(void **p, size_t n) {
    if (used + n > TOTAL) return OUT_OF_MEMORY;
    *p = reserve(n, DEVICE);
    return *p ? SUCCESS : OUT_OF_MEMORY;
}
cudaError_t cudaFree(void *p) { release(p); return SUCCESS; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { *p = reserve(n, HOST); return *p ? SUCCESS : OUT_OF_MEMORY; }
cudaError_t cudaFreeHost(void *p) { release(p); return SUCCESS; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { *total = TOTAL; *free_bytes = TOTAL - used; return SUCCESS; }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    int inside = kind == cudaMemcpyDeviceToDevice ||
                 (kind == cudaMemcpyDefault && kind_of(to) == DEVICE && kind_of(from) == DEVICE);
    if (!capturing && !(inside && n > LARGE)) memcpy(to, from, n);
    return SUCCESS;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { memcpy(to, from, n); return SUCCESS; }
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { memcpy(to, from, n); return SUCCESS; }
cudaError_t cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return SUCCESS; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) {
    if (!capturing && n < 16 * LARGE) memset(p, value, n);
    return SUCCESS;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = kind_of(p);
    a->device = a->type == DEVICE ? 0 : -2;
    a->devicePointer = a->type ? (void *)p : 0;
    a->hostPointer = (void *)p;
    return SUCCESS;
}

/* The device ------------------------------------------------------------------------------------------------------- */
static __thread int current_device;

cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return SUCCESS; }
cudaError_t cudaGetDevice(int *d) { *d = current_device; return SUCCESS; }
cudaError_t cudaSetDevice(int d) { if (d) return INVALID_DEVICE; current_device = d; return SUCCESS; }
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return SUCCESS; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return SUCCESS; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:01:00.0"); return SUCCESS; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return SUCCESS; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->totalGlobalMem = TOTAL;
    p->major = 9;
    p->multiProcessorCount = SMS;
    p->warpSize = 32;
    p->maxThreadsPerBlock = MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = SHARED_PER_BLOCK;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = 60 << 20;
    p->maxGridSize[0] = INT32_MAX;
    p->maxGridSize[1] = p->maxGridSize[2] = MAX_GRID_YZ;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = MAX_THREADS;
    p->maxThreadsDim[2] = 64;
    p->textureAlignment = 512;
    p->memoryBusWidth = 6144;
    p->unifiedAddressing = p->concurrentKernels = p->managedMemory = 1;
    return SUCCESS;
}

/* cudaDeviceAttr and CUdevice_attribute have the same values. */
static int attribute(int which) {
    switch (which) {
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_PER_BLOCK;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMultiProcessorCount: return SMS;
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrMaxThreadsPerBlock: return MAX_THREADS;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxGridDimX: return INT32_MAX;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMemoryClockRate: return 3201000;  /* kHz */
        case cudaDevAttrGlobalMemoryBusWidth: return 6144;
        case cudaDevAttrClockRate: return 1980000;
        default: return 1;
    }
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr which, int d) { *v = attribute(which); return SUCCESS; }

/* Streams, events, graphs ------------------------------------------------------------------------------------------ */
static int forbidden_in_capture(const char *function) {
    if (!capturing) return SUCCESS;
    fprintf(stderr, "null GPU: %s during the capture of a graph\n", function);
    return CAPTURE_UNSUPPORTED;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return SUCCESS; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { *s = handle(); return SUCCESS; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return SUCCESS; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return forbidden_in_capture("cudaStreamQuery"); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { synchronizations++; return forbidden_in_capture("cudaStreamSynchronize"); }
cudaError_t cudaDeviceSynchronize(void) { return forbidden_in_capture("cudaDeviceSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return forbidden_in_capture("cudaEventSynchronize"); }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return SUCCESS; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return SUCCESS; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1.0f; return SUCCESS; }

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { capturing = 1; capturing_stream = s; return SUCCESS; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) { capturing = 0; *g = handle(); return SUCCESS; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = capturing && s == capturing_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return SUCCESS;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *g,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n) {
    cudaStreamIsCapturing(s, status);
    int on = *status == cudaStreamCaptureStatusActive;
    if (id) *id = on ? 7 : 0;
    if (g) *g = on ? (cudaGraph_t)&capturing : 0;
    if (nodes) *nodes = 0;
    if (edges) *edges = 0;
    if (n) *n = 0;
    return SUCCESS;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { *m = cudaStreamCaptureModeGlobal; return SUCCESS; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long flags) { *x = handle(); return SUCCESS; }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) { *n = 1; return SUCCESS; }
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t a, cudaGraphNode_t *b, cudaGraphEdgeData *c, size_t *n) { *n = 0; return SUCCESS; }

/* Kernels ---------------------------------------------------------------------------------------------------------- */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } calls[8];
static __thread int depth;
static void *module_handle[4];
static char symbols[1 << 20];

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
    launches++;
    int good = (unsigned long)block.x * block.y * block.z <= (unsigned)MAX_THREADS && grid.x && grid.y && grid.z &&
               grid.y <= (unsigned)MAX_GRID_YZ && grid.z <= (unsigned)MAX_GRID_YZ;
    if (good) return SUCCESS;
    fprintf(stderr, "null GPU: launch of %u x %u x %u blocks of %u x %u x %u threads\n", grid.x, grid.y, grid.z, block.x, block.y, block.z);
    return INVALID_CONFIGURATION;
}
cudaError_t __cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return cudaLaunchKernel(f, g, b, a, n, s); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
    return cudaLaunchKernel(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream);
}
cudaError_t __cudaGetKernel(void **k, const void *f) { *k = (void *)f; return SUCCESS; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    calls[depth].grid = grid;
    calls[depth].block = block;
    calls[depth].shared = shared;
    calls[depth++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = calls[--depth].grid;
    *block = calls[depth].block;
    *shared = calls[depth].shared;
    *(void **)stream = calls[depth].stream;
    return SUCCESS;
}
void **__cudaRegisterFatBinary(void *binary) { return module_handle; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
char __cudaInitModule(void **h) { return 1; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { *p = symbols; return SUCCESS; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = MAX_THREADS;
    a->numRegs = 64;
    a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = SHARED_PER_BLOCK;
    return SUCCESS;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared, unsigned flags) { *n = 2; return SUCCESS; }
const char *cudaGetErrorString(cudaError_t e) { return "an error of the null GPU"; }
const char *cudaGetErrorName(cudaError_t e) { return "cudaErrorNullGPU"; }

/* The driver, which Triton calls ------------------------------------------------------------------------------------ */
static int context;
static int zero(void) { return SUCCESS; }

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *v) { *v = CUDART_VERSION; return SUCCESS; }
int cuDeviceGet(int *d, int i) { *d = i; return SUCCESS; }
int cuDeviceGetCount(int *n) { *n = 1; return SUCCESS; }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = attribute(which); return SUCCESS; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "NVIDIA H200"); return SUCCESS; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = TOTAL; return SUCCESS; }
int cuDeviceGetUuid(char *u, int d) { memset(u, 1, 16); return SUCCESS; }
int cuDeviceGetUuid_v2(char *u, int d) { memset(u, 1, 16); return SUCCESS; }
int cuCtxGetCurrent(void **c) { *c = &context; return SUCCESS; }
int cuCtxSetCurrent(void *c) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *c) { return SUCCESS; }
int cuCtxPopCurrent_v2(void **c) { *c = &context; return SUCCESS; }
int cuCtxGetDevice(int *d) { *d = 0; return SUCCESS; }
int cuCtxSynchronize(void) { return SUCCESS; }
int cuCtxGetLimit(size_t *v, int limit) { *v = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t v) { return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int d) { return SUCCESS; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; *active = 1; return SUCCESS; }
int cuModuleLoad(void **m, const char *file) { *m = handle(); return SUCCESS; }
int cuModuleLoadData(void **m, const void *image) { *m = handle(); return SUCCESS; }
int cuModuleUnload(void *m) { return SUCCESS; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = handle(); return SUCCESS; }
int cuFuncGetAttribute(int *v, int which, void *f) { *v = which == 0 ? MAX_THREADS : which == 4 ? 64 : 0; return SUCCESS; }
int cuFuncSetAttribute(void *f, int which, int v) {
    if (v <= SHARED_PER_BLOCK) return SUCCESS;
    fprintf(stderr, "null GPU: a kernel needs %d bytes of shared memory, the device has %d\n", v, SHARED_PER_BLOCK);
    return 1;
}
int cuFuncSetCacheConfig(void *f, int c) { return SUCCESS; }
int cuGetErrorString(int e, const char **s) { *s = "an error of the null GPU"; return SUCCESS; }
int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_NULL_GPU"; return SUCCESS; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *s, void **a, void **e) {
    launches++;
    return gx && gy <= (unsigned)MAX_GRID_YZ && gz <= (unsigned)MAX_GRID_YZ ? SUCCESS : 1;
}
int cuLaunchKernelEx(void *c, void *f, void **a, void **e) { launches++; return SUCCESS; }
int cuPointerGetAttribute(void *v, int which, unsigned long long p) { *(unsigned long long *)v = p; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { *n = SMS / 2; return SUCCESS; }
int cuTensorMapEncodeTiled(void) { return SUCCESS; }
int cuMemsetD32Async(void *p, unsigned v, size_t n, void *s) { return SUCCESS; }
int cuStreamWriteValue32_v2(void) { return SUCCESS; }
static void *find(const char *name) { void *p = dlsym(RTLD_DEFAULT, name); return p ? p : (void *)zero; }
int cuGetProcAddress_v2(const char *name, void **p, int v, unsigned long long flags, int *status) {
    *p = find(name);
    if (status) *status = 0;
    return SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned v, unsigned long long flags, enum cudaDriverEntryPointQueryResult *r) {
    *p = find(name);
    if (r) *r = cudaDriverEntryPointSuccess;
    return SUCCESS;
}

/* cuBLAS ----------------------------------------------------------------------------------------------------------- */
int cublasCreate_v2(void **h) { *h = handle(); return SUCCESS; }
int cublasGetMathMode(void *h, int *m) { *m = 0; return SUCCESS; }
int cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return SUCCESS; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtCreate(void **h) { *h = handle(); return SUCCESS; }
int cublasLtMatmulDescCreate(void **d, int a, int b) { *d = handle(); return SUCCESS; }
int cublasLtMatmulPreferenceCreate(void **d) { *d = handle(); return SUCCESS; }
int cublasLtMatrixLayoutCreate(void **d, int type, unsigned long rows, unsigned long columns, long ld) { *d = handle(); return SUCCESS; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *o, void *a, void *b, void *c, void *d, void *p, int n, void *results, int *found) { *found = 1; return SUCCESS; }
int cublasGemmEx(void) { launches++; return SUCCESS; }
int cublasGemmStridedBatchedEx(void) { launches++; return SUCCESS; }
int cublasLtMatmul(void) { launches++; return SUCCESS; }

/* NCCL, one rank --------------------------------------------------------------------------------------------------- */
typedef void *Comm;
typedef struct { char bytes[128]; } UniqueId;
static size_t width(int type) {
    static const int bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return bytes[type];
}
static int copy(const void *from, void *to, size_t n) { if (from != to && n < LARGE) memcpy(to, from, n); return SUCCESS; }

int ncclGetVersion(int *v) { *v = 22809; return SUCCESS; }
int ncclGetUniqueId(UniqueId *id) { memset(id, 1, sizeof *id); return SUCCESS; }
int ncclCommInitRank(Comm *c, int ranks, UniqueId id, int rank) { *c = handle(); return ranks == 1 ? SUCCESS : 3; }
int ncclCommInitRankConfig(Comm *c, int ranks, UniqueId id, int rank, void *config) { return ncclCommInitRank(c, ranks, id, rank); }
int ncclCommSplit(Comm c, int color, int key, Comm *out, void *config) { *out = handle(); return SUCCESS; }
int ncclCommGetAsyncError(Comm c, int *e) { *e = 0; return SUCCESS; }
int ncclCommCount(Comm c, int *n) { *n = 1; return SUCCESS; }
int ncclCommUserRank(Comm c, int *r) { *r = 0; return SUCCESS; }
const char *ncclGetErrorString(int e) { return "an error of the null NCCL"; }
const char *ncclGetLastError(Comm c) { return ""; }
int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, Comm c, void *s) { return copy(from, to, n * width(type)); }
int ncclAllGather(const void *from, void *to, size_t n, int type, Comm c, void *s) { return copy(from, to, n * width(type)); }
int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, Comm c, void *s) { return copy(from, to, n * width(type)); }
int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, Comm c, void *s) { return copy(from, to, n * width(type)); }
int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, Comm c, void *s) { return copy(from, to, n * width(type)); }

__attribute__((destructor)) static void report(void) {
    const char *file = getenv("NULLGPU_COUNT");
    FILE *f = file ? fopen(file, "w") : 0;
    if (!f) return;
    fprintf(f, "{\"launches\": %ld, \"synchronizations\": %ld, \"peak_bytes\": %zu}\n", launches, synchronizations, peak);
    fclose(f);
}
