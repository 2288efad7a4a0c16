// A card's runtime in the memory of the process: what it launches are kernels that were built for the emulator.
//
// Compiled with PREFIX=mc or hc for MetaX's names, with CUDA for NVIDIA's. A module is a shared library, of which
// sb_launch_NAME runs a kernel and sb_count_NAME tells how many parameters it has. fake_set breaks things on purpose.
//
// What is put into a stream runs when somebody waits or copies, as late as can be: of the operations that streams and events
// let run next the first, the last or any, by ORDER. A stream may only wait for an event that was recorded, and a recording
// ends only when all streams in it have been waited for.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_FOUND = 500, LAUNCH_FAILED = 719, NOT_PERMITTED = 800, UNJOINED = 904 };
static void finish(void);
enum { DEVICES, MEMORY, TAKES_ADDRESSES, PACKED_END, RECORDS, ORDER, CURRENT };
static int64_t settings[] = {1, 1 << 28, 1, -1, 1, 0, 0};
static int64_t counts[8];  // launches, launches of graphs, copies, bytes, modules, streams and events in use, waits
static char fault[2048] = "unspecified launch failure";
static int failed;

void fake_set(int what, int64_t value) { settings[what] = value; }
int64_t fake_get(int what) { return settings[what]; }
int64_t fake_count(int what) { return counts[what]; }
void fake_reset(void) {
  memset(counts, 0, sizeof(int64_t) * 3);
  failed = 0;
}

static const char* error_name(int error) {
  switch (error) {
    case OUT_OF_MEMORY: return "ErrorMemoryAllocation";
    case INVALID_VALUE: return "ErrorInvalidValue";
    case LAUNCH_FAILED: return "ErrorLaunchFailure";
    case NOT_PERMITTED: return "ErrorStreamCaptureUnsupported";
    case UNJOINED: return "ErrorStreamCaptureUnjoined";
    default: return "ErrorNotFound";
  }
}
static const char* error_text(int error) {
  return error == LAUNCH_FAILED ? fault : error == OUT_OF_MEMORY ? "out of memory" : "invalid argument";
}

// Memory.

typedef struct {
  const char* start;
  uint64_t bytes;
} Extent;
static Extent blocks[4096];
static int block_count;

static int allocate(void** place, size_t size) {
  if (settings[CURRENT]) return INVALID_VALUE;  // this runtime is that of device 0
  if (counts[3] + (int64_t)size > settings[MEMORY] || block_count == 4096) return OUT_OF_MEMORY;
  if (posix_memalign(place, 256, size)) return OUT_OF_MEMORY;
  for (size_t i = 0; i + 1 < size; i += 2) memcpy((char*)*place + i, "\xcd\xff", 2);  // not yet written
  blocks[block_count++] = (Extent){*place, size};
  counts[3] += size;
  return OK;
}

static int release(void* address) {
  finish();
  for (int i = 0; i < block_count; ++i)
    if (blocks[i].start == address) {
      counts[3] -= blocks[i].bytes;
      blocks[i] = blocks[--block_count];
      free(address);
      return OK;
    }
  return INVALID_VALUE;
}

static int inside(const void* address, size_t size) {
  for (int i = 0; i < block_count; ++i) {
    const char* start = blocks[i].start;
    if ((const char*)address >= start && (const char*)address + size <= start + blocks[i].bytes) return 1;
  }
  return 0;
}

// Modules and launches.

typedef struct {
  void* library;
} Module;
typedef const char* (*Launcher)(const unsigned*, const unsigned*, unsigned, void**, int);
typedef struct {
  Launcher run;
  void (*set_buffers)(const Extent*, unsigned);
  int count;
  unsigned most_shared;  // that a launch may ask for
} Function;
typedef struct {
  const Function* function;
  unsigned grid[3], block[3], shared;
  int64_t arguments[64];
} Node;

// What waits to run: launches, launches of graphs, and events, which are done when they run. Each waits for what was
// before it in its stream, and for the event that it names.
typedef struct Graph Graph;
typedef struct {
  Node* node;
  Graph* graph;
  int before[2], done;  // places, -1 for none
} Operation;
typedef struct {
  Operation operations[4096];
  int count;
} Queue;
struct Graph {
  Queue queue;
};
typedef struct {
  int last, last_in;  // of what is pending, and of the graph; -1 for none
  int in;  // the number of the recording that the stream is in, 0 for none
} Stream;
typedef struct {
  int64_t place;  // among all that were pending, or in the graph; -1 before it is recorded
  int in;
} Event;
static Queue pending;
static int64_t gone;  // operations that were pending before
static Stream default_stream = {-1};
static Stream* streams[64];
static int stream_count, recordings;
static Graph* recording;
static Stream* origin;

static Stream* stream_of(void* stream) { return stream ? stream : &default_stream; }

static int put(Queue* queue, Operation operation) {
  if (queue->count == 4096) abort();  // more than a test launches without waiting
  queue->operations[queue->count] = operation;
  return queue->count++;
}

// Adds an operation to a stream, or to what records it.
static void append(Stream* stream, Node* node, Graph* graph, int event) {
  int* last = stream->in ? &stream->last_in : &stream->last;
  *last = put(stream->in ? &recording->queue : &pending, (Operation){node, graph, {*last, event}, 0});
}

static int load(void** place, const void* image) {
  if (settings[CURRENT]) return INVALID_VALUE;
  const Elf64_Ehdr* head = image;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG)) return INVALID_VALUE;
  const size_t size = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
  char name[64];
  const int file = memfd_create("module", 0);
  if (write(file, image, size) != (ssize_t)size) return INVALID_VALUE;
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  Module* module = malloc(sizeof(Module));
  module->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!module->library) return INVALID_VALUE;
  *place = module;
  ++counts[4];
  return OK;  // the file stays open, so that each module has a name of its own
}

static int find(void** place, Module* module, const char* name) {
  char symbol[256];
  Function* function = malloc(sizeof(Function));
  snprintf(symbol, sizeof symbol, "sb_launch_%s", name);
  function->run = (Launcher)dlsym(module->library, symbol);
  snprintf(symbol, sizeof symbol, "sb_count_%s", name);
  const int* count = dlsym(module->library, symbol);
  function->set_buffers = dlsym(module->library, "sb_buffers");
  if (!function->run || !count) return NOT_FOUND;
  function->count = *count;
#ifdef CUDA
  function->most_shared = 48 << 10;
#else
  function->most_shared = 64 << 10;
#endif
  *place = function;
  return OK;
}

static int run_node(const Node* node) {
  void* addresses[64];
  for (int i = 0; i < node->function->count; ++i) addresses[i] = (void*)&node->arguments[i];
  Extent given[64];
  unsigned count = 0;
  for (int i = 0; i < node->function->count; ++i)
    for (int j = 0; j < block_count; ++j)
      if ((uint64_t)node->arguments[i] - (uint64_t)blocks[j].start < blocks[j].bytes) given[count++] = blocks[j];
  node->function->set_buffers(given, count);
  const char* found = node->function->run(node->grid, node->block, node->shared, addresses, (int)settings[ORDER]);
  if (found) {
    snprintf(fault, sizeof fault, "%s", found);
    failed = 1;  // comes to light later, as on a card
  }
  return OK;
}

static int launch(const Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                  unsigned bz, unsigned shared, void* stream, void** addresses, void** extra) {
  if (settings[CURRENT] || !gx || !gy || !gz || bx * by * bz > 1024 || shared > function->most_shared) return INVALID_VALUE;
  Node node = {function, {gx, gy, gz}, {bx, by, bz}, shared, {0}};
  if (addresses) {
    if (!settings[TAKES_ADDRESSES]) return INVALID_VALUE;
    for (int i = 0; i < function->count; ++i) node.arguments[i] = *(int64_t*)addresses[i];
  } else {
    if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != (void*)settings[PACKED_END]) return INVALID_VALUE;
    if (*(size_t*)extra[3] != 8u * function->count) return INVALID_VALUE;
    memcpy(node.arguments, extra[1], *(size_t*)extra[3]);
  }
  ++counts[0];
  append(stream_of(stream), memcpy(malloc(sizeof node), &node, sizeof node), NULL, -1);
  return OK;
}

// Runs operations, those that may run next in the order that is asked for.
static void run_all(Queue* queue) {
  static unsigned random = 1;
  for (;;) {
    int ready[4096], count = 0;
    for (int i = 0; i < queue->count; ++i) {
      const Operation* o = &queue->operations[i];
      int can = !o->done;
      for (int j = 0; j < 2; ++j) can = can && (o->before[j] < 0 || queue->operations[o->before[j]].done);
      if (can) ready[count++] = i;
    }
    if (!count) return;
    random = random * 1103515245 + 12345;
    Operation* next = &queue->operations[ready[settings[ORDER] == 0 ? 0 : settings[ORDER] == 1 ? count - 1 : (random >> 16) % count]];
    if (next->node) run_node(next->node);
    if (next->graph) {
      for (int i = 0; i < next->graph->queue.count; ++i) next->graph->queue.operations[i].done = 0;
      run_all(&next->graph->queue);
    }
    next->done = 1;
  }
}

static void finish(void) {
  run_all(&pending);
  for (int i = 0; i < pending.count; ++i) free(pending.operations[i].node);
  for (int i = 0; i < stream_count; ++i) streams[i]->last = -1;
  default_stream.last = -1;
  gone += pending.count;
  pending.count = 0;
}

static int new_stream(void** place) {
  if (settings[CURRENT] || stream_count == 64) return INVALID_VALUE;
  Stream* stream = malloc(sizeof(Stream));
  *stream = (Stream){-1, -1, 0};
  *place = streams[stream_count++] = stream;
  ++counts[5];
  return OK;
}
static int destroy_stream(Stream* stream) {
  finish();
  for (int i = 0; i < stream_count; ++i)
    if (streams[i] == stream) streams[i] = streams[--stream_count];
  --counts[5];
  free(stream);
  return OK;
}
static int new_event(void** place) {
  if (settings[CURRENT]) return INVALID_VALUE;
  Event* event = malloc(sizeof(Event));
  *event = (Event){-1, 0};
  *place = event;
  ++counts[6];
  return OK;
}
static int record(Event* event, Stream* stream) {
  append(stream, NULL, NULL, -1);
  *event = (Event){stream->in ? stream->last_in : gone + stream->last, stream->in};
  return OK;
}
static int wait_for(Stream* stream, Event* event) {
  ++counts[7];
  if (recording && event->in == recordings && !stream->in) *stream = (Stream){stream->last, -1, recordings};
  if (event->place == -1 || event->in != stream->in) return INVALID_VALUE;  // not recorded, or elsewhere
  const int64_t place = stream->in ? event->place : event->place - gone;
  append(stream, NULL, NULL, place < 0 ? -1 : (int)place);
  return OK;
}

static int begin(Stream* stream, int mode) {
  if (mode != 1) return INVALID_VALUE;  // other modes stop other threads, or allow too much
  if (!stream || !settings[RECORDS]) return NOT_PERMITTED;
  recording = calloc(1, sizeof(Graph));
  *stream = (Stream){stream->last, -1, ++recordings};
  origin = stream;
  return OK;
}
static int is_before(const Queue* queue, int first, int second) {
  char reached[4097] = {0};  // by place + 1
  reached[second + 1] = 1;
  for (int i = second; i > first; --i)
    for (int j = 0; j < 2; ++j)
      if (reached[i + 1]) reached[queue->operations[i].before[j] + 1] = 1;
  return reached[first + 1];
}
static int end(void** graph) {
  *graph = recording;
  if (!recording) return INVALID_VALUE;
  int joined = 1;
  for (int i = 0; i < stream_count; ++i)
    if (streams[i]->in) {
      joined = joined && is_before(&recording->queue, streams[i]->last_in, origin->last_in);
      streams[i]->in = 0;
    }
  recording = NULL;
  return joined ? OK : UNJOINED;
}
static int instantiate(void** executable, const Graph* graph) {
  *executable = memcpy(malloc(sizeof(Graph)), graph, sizeof(Graph));
  return OK;
}
static int launch_graph(Graph* graph, Stream* stream) {
  ++counts[1];
  append(stream, NULL, graph, -1);
  return OK;
}
static int destroy_executable(Graph* graph) {
  finish();
  return free(graph), OK;
}
static int synchronize(void) {
  finish();
  return failed ? LAUNCH_FAILED : OK;
}
static int device_count(int* count) {
  *count = (int)settings[DEVICES];
  return OK;
}
static int copied(void* target, const void* source, size_t size) {
  finish();
  if (failed) return LAUNCH_FAILED;
  if (settings[CURRENT]) return INVALID_VALUE;
  memmove(target, source, size);
  ++counts[2];
  return OK;
}

#ifdef CUDA
#define F(name) cu##name
#define ASYNC(direction) F(Memcpy##direction##Async_v2)
int F(GetErrorName)(int error, const char** text) { return *text = error_name(error), OK; }
int F(GetErrorString)(int error, const char** text) { return *text = error_text(error), OK; }
int F(DeviceGetCount)(int* count) { return device_count(count); }
int F(DevicePrimaryCtxRetain)(void** context, int device) { return *context = (void*)(intptr_t)(device + 7), OK; }
int F(CtxSetCurrent)(void* context) { return settings[CURRENT] = (intptr_t)context - 7, OK; }
int F(CtxGetCurrent)(void** context) { return *context = (void*)(intptr_t)(settings[CURRENT] + 7), OK; }
int F(DeviceGetAttribute)(int* value, int attribute, int device) {
  return *value = attribute == 75 ? 9 : 0, OK;
}
int F(MemGetInfo_v2)(size_t* free, size_t* total) {
  return *total = settings[MEMORY], *free = *total - counts[3], OK;
}
int F(MemAlloc_v2)(void** place, size_t size) { return allocate(place, size); }
int F(MemFree_v2)(void* address) { return release(address); }
int ASYNC(HtoD)(void* to, void* from, size_t n, void* s) { return inside(to, n) ? copied(to, from, n) : INVALID_VALUE; }
int ASYNC(DtoH)(void* to, void* from, size_t n, void* s) { return inside(from, n) ? copied(to, from, n) : INVALID_VALUE; }
int ASYNC(DtoD)(void* to, void* from, size_t n, void* s) { return copied(to, from, n); }
int F(MemsetD8Async)(void* to, unsigned char byte, size_t n, void* s) { return finish(), memset(to, byte, n), OK; }
int F(StreamCreate)(void** place, unsigned flags) { return new_stream(place); }
int F(StreamDestroy_v2)(void* stream) { return destroy_stream(stream); }
int F(CtxSynchronize)(void) { return synchronize(); }
int F(EventCreate)(void** place, unsigned flags) { return new_event(place); }
int F(FuncSetAttribute)(Function* function, int attribute, int value) {
  if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
  return function->most_shared = value, OK;
}
int F(LaunchKernel)(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned n,
                    void* s, void** a, void** e) {
  return launch(f, gx, gy, gz, bx, by, bz, n, s, a, e);
}
int F(StreamBeginCapture_v2)(void* stream, int mode) { return begin(stream, mode); }
int F(GraphInstantiateWithFlags)(void** out, void* graph, unsigned long long flags) { return instantiate(out, graph); }
#else
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define F(name) JOIN(PREFIX, name)
const char* F(GetErrorName)(int error) { return error_name(error); }
const char* F(GetErrorString)(int error) { return error_text(error); }
int F(GetDeviceCount)(int* count) { return device_count(count); }
int F(SetDevice)(int device) { return settings[CURRENT] = device, OK; }
int F(GetDevice)(int* device) { return *device = (int)settings[CURRENT], OK; }
int F(MemGetInfo)(size_t* free, size_t* total) {
  return *total = settings[MEMORY], *free = *total - counts[3], OK;
}
int F(Malloc)(void** place, size_t size) { return allocate(place, size); }
int F(Free)(void* address) { return release(address); }
int F(MemcpyAsync)(void* to, void* from, size_t n, int kind, void* s) {
  const int fits = kind == 1 ? inside(to, n) : kind == 2 ? inside(from, n) : inside(to, n) && inside(from, n);
  return fits ? copied(to, from, n) : INVALID_VALUE;
}
int F(MemsetAsync)(void* to, int byte, size_t n, void* s) { return finish(), memset(to, byte, n), OK; }
int F(StreamCreateWithFlags)(void** place, unsigned flags) { return new_stream(place); }
int F(StreamDestroy)(void* stream) { return destroy_stream(stream); }
int F(DeviceSynchronize)(void) { return synchronize(); }
int F(EventCreateWithFlags)(void** place, unsigned flags) { return new_event(place); }
#ifndef OLD
int F(ModuleLaunchKernel)(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned n, void* s, void** a, void** e) {
  return launch(f, gx, gy, gz, bx, by, bz, n, s, a, e);
}
#endif
int F(StreamBeginCapture)(void* stream, int mode) { return begin(stream, mode); }
int F(GraphInstantiate)(void** out, void* graph, void** node, char* log, size_t n) { return instantiate(out, graph); }
#endif
int F(Init)(unsigned flags) { return OK; }
int F(DeviceGetName)(char* text, int size, int device) { return snprintf(text, size, "pretended card"), OK; }
int F(StreamSynchronize)(void* stream) { return synchronize(); }
int F(StreamWaitEvent)(void* stream, void* event, unsigned flags) { return wait_for(stream_of(stream), event); }
int F(EventRecord)(void* event, void* stream) { return record(event, stream_of(stream)); }
int F(EventSynchronize)(void* event) { return synchronize(); }
int F(EventElapsedTime)(float* found, void* start, void* end) { return *found = 0.5f, OK; }
int F(ModuleLoadData)(void** place, const void* image) { return load(place, image); }
int F(ModuleUnload)(void* module) { return --counts[4], OK; }  // what it loaded stays: numbers stay what they were
int F(ModuleGetFunction)(void** place, void* module, const char* name) { return find(place, module, name); }
int F(StreamEndCapture)(void* stream, void** graph) { return end(graph); }
int F(GraphLaunch)(void* graph, void* stream) { return launch_graph(graph, stream_of(stream)); }
int F(GraphExecDestroy)(void* graph) { return destroy_executable(graph); }
int F(GraphDestroy)(void* graph) { return free(graph), OK; }
