// What a generated program needs of a machine: memory, launches, matrix products, files.
//
// The program is written against the MACA runtime. nvcc gets CUDA's names for it; the emulator (SB_EMULATOR) the memory
// of the process. Kernels have one launch signature everywhere: kernel, grid, threads, shared bytes, stream, void**.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(SB_EMULATOR)
#include <maca_bfloat16.h>
#include <maca_fp16.h>

#include "sb_machine.h"
typedef const char* (*kernel_t)(const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
                                int order);
#define KERNEL(name) sb_launch_##name
#else
typedef const void* kernel_t;
#define KERNEL(name) reinterpret_cast<const void*>(name)
#if defined(__CUDACC__)
#ifdef SB_LIBRARY
#include <cublas_v2.h>
#endif
#define mcError_t cudaError_t
#define mcSuccess cudaSuccess
#define mcGetErrorName cudaGetErrorName
#define mcGetErrorString cudaGetErrorString
#define mcStream_t cudaStream_t
#define mcStreamCreateWithFlags cudaStreamCreateWithFlags
#define mcStreamNonBlocking cudaStreamNonBlocking
#define mcStreamSynchronize cudaStreamSynchronize
#define mcStreamWaitEvent cudaStreamWaitEvent
#define mcEvent_t cudaEvent_t
#define mcEventCreateWithFlags cudaEventCreateWithFlags
#define mcEventDisableTiming cudaEventDisableTiming
#define mcEventRecord cudaEventRecord
#define mcMalloc cudaMalloc
#define mcFree cudaFree
#define mcMemcpyAsync cudaMemcpyAsync
#define mcMemcpyHostToDevice cudaMemcpyHostToDevice
#define mcMemcpyDeviceToHost cudaMemcpyDeviceToHost
#define mcLaunchKernel cudaLaunchKernel
#define mcblasHandle_t cublasHandle_t
#define mcblasCreate cublasCreate
#define mcblasSetStream cublasSetStream
#define mcblasGemmStridedBatchedEx cublasGemmStridedBatchedEx
#define MCBLAS_OP_N CUBLAS_OP_N
#define MCBLAS_OP_T CUBLAS_OP_T
#define MCBLAS_GEMM_DEFAULT CUBLAS_GEMM_DEFAULT
#define MCBLAS_COMPUTE_32F CUBLAS_COMPUTE_32F
#define MCBLAS_COMPUTE_32F_PEDANTIC CUBLAS_COMPUTE_32F_PEDANTIC
#define MCBLAS_COMPUTE_32I CUBLAS_COMPUTE_32I
#define MACA_R_32F CUDA_R_32F
#define MACA_R_16F CUDA_R_16F
#define MACA_R_16BF CUDA_R_16BF
#define MACA_R_8I CUDA_R_8I
#define MACA_R_32I CUDA_R_32I
#elif defined(SB_LIBRARY)
#include <mcblas/mcblas.h>
#endif
#endif

namespace sb_host {

[[noreturn]] inline void fail(const std::string& what, const std::string& why) {
  fprintf(stderr, "error: %s\n  because: %s\n", what.c_str(), why.c_str());
  exit(1);
}

inline void require(bool condition, const char* entry, const char* why) {
  if (!condition) fail(std::string("arguments of '") + entry + "' do not fit together", why);
}

enum class Type { f64, f32, f16, bf16, i64, i32, i16, i8, u8, b };
inline int64_t size_of(Type type) {
  switch (type) {
    case Type::f64: case Type::i64: return 8;
    case Type::f32: case Type::i32: return 4;
    case Type::f16: case Type::bf16: case Type::i16: return 2;
    default: return 1;
  }
}
// As files of numpy name them; bfloat16 travels as its 16 bits.
inline const char* npy_name(Type type) {
  const char* const names[] = {"<f8", "<f4", "<f2", "<u2", "<i8", "<i4", "<i2", "|i1", "|u1", "|b1"};
  return names[static_cast<int>(type)];
}

inline int64_t aligned(int64_t bytes) { return bytes > 0 ? (bytes + 255) / 256 * 256 : 256; }

typedef std::vector<int64_t> Shape;
inline int64_t count_of(const Shape& shape) {
  int64_t count = 1;
  for (int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(count, size, &count)) fail("no array can have such sizes", "one is negative, or there are too many elements");
  return count;
}

struct Buffer {
  std::shared_ptr<char> memory;
  int64_t bytes = 0;
  Type type = Type::f32;
  Shape shape;
  char* data() const { return memory.get(); }
  int64_t dim(int axis) const { return shape[axis]; }
  Buffer as(const Shape& other) const {
    Buffer view = *this;
    view.shape = other;
    return view;
  }
};

// A temporary of a workspace, from the step that first uses it to the one that last does.
struct Life {
  Buffer* buffer;
  Type type;
  Shape shape;
  int first, last;
  int64_t bytes = 0, start = 0;
};

// Places temporaries, the largest first, each at the lowest place where nothing lies that lives at the same time; returns
// the bytes of all. One of a negative size gets no place: it is an error where a step uses it.
inline int64_t place(std::vector<Life>& lives) {
  const auto is_negative = [](const Life& life) { return std::any_of(life.shape.begin(), life.shape.end(), [](int64_t n) { return n < 0; }); };
  lives.erase(std::remove_if(lives.begin(), lives.end(), is_negative), lives.end());
  for (Life& life : lives) life.bytes = count_of(life.shape) * size_of(life.type);
  std::stable_sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) {
    return a.bytes != b.bytes ? a.bytes > b.bytes : a.first < b.first;
  });
  std::vector<const Life*> placed;  // by start
  int64_t end = 0;
  for (Life& life : lives) {
    const int64_t size = aligned(life.bytes);
    for (const Life* other : placed) {
      if (other->last < life.first || life.last < other->first) continue;
      if (life.start + size <= other->start) break;
      life.start = std::max(life.start, other->start + aligned(other->bytes));
    }
    end = std::max(end, life.start + size);
    const auto is_before = [](const Life* a, const Life* b) { return a->start < b->start; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &life, is_before), &life);
  }
  return end;
}

// A parameter of a kernel: an address, or a number in the low bytes.
struct Argument {
  int64_t bits = 0;
  const Buffer* buffer = nullptr;
  Argument(const Buffer& b) : buffer(&b) {
    char* address = b.data();
    memcpy(&bits, &address, sizeof address);
  }
  Argument(int64_t value) : bits(value) {}
  static Argument f32(double value) {
    const float narrow = static_cast<float>(value);
    return of(&narrow, sizeof narrow);
  }
  static Argument f64(double value) { return of(&value, sizeof value); }

 private:
  static Argument of(const void* value, size_t size) {
    Argument made(0);
    memcpy(&made.bits, value, size);
    return made;
  }
};

inline int64_t nonzero(int64_t b) {
  if (!b) fail("a size cannot be computed", "it divides by 0 for these arguments");
  return b;
}
inline int64_t quotient(int64_t a, int64_t b) { return a / nonzero(b); }
inline int64_t remainder(int64_t a, int64_t b) { return a % nonzero(b); }
inline int64_t ceildiv(int64_t a, int64_t b) { return quotient(a, b) + (a % b != 0 && (a < 0) == (b < 0)); }
inline int64_t floordiv(int64_t a, int64_t b) { return quotient(a, b) - (a % b != 0 && (a < 0) != (b < 0)); }
inline int64_t step(int64_t by) {
  if (by < 1) fail("a loop does not end", "it goes on by " + std::to_string(by));
  return by;
}

// C = op(X) op(Y), or C + it: matrices in columns, as the vendor's library counts them.
struct Product {
  bool transposed_x, transposed_y, adds;
  int64_t m, n, k, ld_x, ld_y, ld_c, batch, stride_x, stride_y, stride_c;
};

class Machine {
 public:
  Machine() {
#ifdef SB_EMULATOR
    const char* order = getenv("SPIKINGBRAIN_EMULATOR_ORDER");
    const char* const known[] = {"forward", "reverse", "shuffled"};
    for (order_ = 0; order && order_ < 3 && strcmp(order, known[order_]);) ++order_;
    if (order_ == 3) fail(std::string("unknown thread order ") + order, "SPIKINGBRAIN_EMULATOR_ORDER is forward, reverse or shuffled");
#else
    streams_.push_back(new_stream());
#endif
  }

  // An entry point on several streams: number 0 is the machine's own. Event 0 stands for what was put into that before.
  // The others wait for it, or for a later event, and stream 0 for each of them before the end.
  void begin(int streams) {
#ifdef SB_EMULATOR
    streams_.assign(streams, Stream());
    streams_[0].begun = true;
    events_.clear();
#else
    while ((int)streams_.size() < streams) streams_.push_back(new_stream());
#endif
    record(0, 0);
  }

  void record(int event, int stream) {
#ifdef SB_EMULATOR
    events_[event] = put(stream, -1, nullptr);
#else
    while ((int)events_.size() <= event) {
      mcEvent_t made;
      check(mcEventCreateWithFlags(&made, mcEventDisableTiming), "mcEventCreateWithFlags");
      events_.push_back(made);
    }
    check(mcEventRecord(events_[event], streams_[stream]), "mcEventRecord");
#endif
  }

  void wait(int stream, int event) {
#ifdef SB_EMULATOR
    if (!events_.count(event)) fail("a stream waits for an event", "nothing has recorded it");
    streams_[stream].begun = true;
    put(stream, events_[event], nullptr);
#else
    check(mcStreamWaitEvent(streams_[stream], events_[event], 0), "mcStreamWaitEvent");
#endif
  }

  void end() {
#ifdef SB_EMULATOR
    std::vector<bool> reached(operations_.size());
    reached[streams_[0].last] = true;
    for (size_t i = operations_.size(); i-- > 0;) {
      for (int before : operations_[i].before)
        if (reached[i] && before >= 0) reached[before] = true;
      if (!reached[i]) fail("a stream is left alone", "the machine's own does not wait for it");
    }
    finish();
    streams_.resize(1);
#endif
  }

  Buffer make(Type type, const Shape& shape) {
    Buffer made;
    made.type = type;
    made.shape = shape;
    made.bytes = count_of(shape) * size_of(type);
    const int64_t size = aligned(made.bytes);
    char* address = take(size);
    made.memory = std::shared_ptr<char>(address, [this, size](char* p) { free_[size].push_back(p); });
#ifdef SB_EMULATOR
    fresh_.push_back({address, size});
    if (streams_.size() == 1) put(0, -1, [] {});
#endif
    return made;
  }

  // Gives a buffer memory at its first use, and where a loop needs more of it than in the rounds before.
  void need(Buffer& buffer, Type type, const Shape& shape) {
    if (!buffer.memory || buffer.bytes < count_of(shape) * size_of(type)) buffer = make(type, shape);
  }

  // Gives a workspace memory for temporaries whose sizes are known.
  void reserve(Buffer& workspace, std::vector<Life> lives) {
    const int64_t size = SPREAD * place(lives);
    if (workspace.bytes >= size) return;
    workspace = Buffer();
    workspace = make(Type::u8, {size});
  }

  // Gives temporaries their places in a workspace.
  void lay(Buffer& workspace, std::vector<Life> lives) {
    reserve(workspace, lives);
    place(lives);
    for (const Life& life : lives) {
      life.buffer->memory = std::shared_ptr<char>(workspace.memory, workspace.data() + SPREAD * life.start);
      life.buffer->bytes = life.bytes;
      life.buffer->type = life.type;
      life.buffer->shape = life.shape;
    }
  }

  // The next step is the first that uses a temporary of a workspace: another one may have lain there.
  void begin_life(const Buffer& buffer) {
#ifdef SB_EMULATOR
    if (!buffer.memory) return;
    fresh_.push_back({buffer.data(), aligned(buffer.bytes)});
    put(0, -1, [] {});
#endif
  }

  Buffer upload(Type type, const Shape& shape, const void* source) {
    Buffer made = make(type, shape);
    if (!made.bytes) return made;
#ifdef SB_EMULATOR
    memcpy(made.data(), source, made.bytes);
#else
    check(mcMemcpyAsync(made.data(), source, made.bytes, mcMemcpyHostToDevice, streams_[0]), "mcMemcpyAsync");
    check(mcStreamSynchronize(streams_[0]), "mcStreamSynchronize");
#endif
    return made;
  }

  void download(void* target, const char* source, int64_t bytes) {
    if (!bytes) return;
#ifdef SB_EMULATOR
    memcpy(target, source, bytes);
#else
    check(mcMemcpyAsync(target, source, bytes, mcMemcpyDeviceToHost, streams_[0]), "mcMemcpyAsync");
    check(mcStreamSynchronize(streams_[0]), "mcStreamSynchronize");
#endif
  }

  // Waits for one element.
  template <class T>
  T read(const Buffer& buffer, int64_t place) {
    T value;
    download(&value, buffer.data() + place * sizeof(T), sizeof(T));
    return value;
  }

  void launch(kernel_t kernel, const char* name, const int64_t (&grid)[3], unsigned threads, unsigned shared,
              std::vector<Argument> arguments, int stream = 0) {
#ifdef SB_EMULATOR
    if (!streams_[stream].begun) fail("stream " + std::to_string(stream) + " is not begun", "it waits for nothing");
    put(stream, -1, [] {});  // what is new is so from here on, whether there are blocks or not
#endif
    if (!grid[0] || !grid[1] || !grid[2]) return;
    for (int64_t size : grid)
      if (size < 0 || size > INT32_MAX) fail(std::string("kernel '") + name + "' cannot be launched", "its grid is out of range");
#ifdef SB_EMULATOR
    std::vector<sb_buffer> extents;
    for (const Argument& argument : arguments)
      if (argument.buffer) extents.push_back({argument.buffer->data(), (uint64_t)argument.buffer->bytes});
    const std::vector<unsigned> blocks = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    put(stream, -1, [=]() mutable {
      std::vector<void*> addresses;
      for (Argument& argument : arguments) addresses.push_back(&argument.bits);
      const unsigned block[3] = {threads, 1, 1};
      sb_buffers(extents.data(), extents.size());
      const char* fault = kernel(blocks.data(), block, shared, addresses.data(), order_);
      if (fault) fail(std::string("kernel '") + name + "' breaks a rule of the machine", fault);
    });
#else
    std::vector<void*> addresses;
    for (Argument& argument : arguments) addresses.push_back(&argument.bits);
#ifdef __CUDACC__
    if (shared > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
#endif
    check(mcLaunchKernel(kernel, dim3(grid[0], grid[1], grid[2]), dim3(threads), addresses.data(), shared, streams_[stream]), name);
#endif
  }

#if defined(SB_EMULATOR)
  void multiply(const Product& p, const Buffer& x, const Buffer& y, const Buffer& c) {
    put(0, -1, [=] { multiply_now(p, x, y, c); });
  }

 private:
  void multiply_now(const Product& p, const Buffer& x, const Buffer& y, const Buffer& c) {
    for (int64_t i = 0; i < p.batch; ++i)
      for (int64_t column = 0; column < p.n; ++column)
        for (int64_t row = 0; row < p.m; ++row) {
          double sum = 0;  // exact for products of bytes
          for (int64_t j = 0; j < p.k; ++j)
            sum += get(x, i * p.stride_x + (p.transposed_x ? j + row * p.ld_x : row + j * p.ld_x)) *
                   get(y, i * p.stride_y + (p.transposed_y ? column + j * p.ld_y : j + column * p.ld_y));
          const int64_t place = i * p.stride_c + row + column * p.ld_c;
          put(c, place, p.adds ? sum + get(c, place) : sum);
        }
  }
#elif defined(SB_LIBRARY)
  void multiply(const Product& p, const Buffer& x, const Buffer& y, const Buffer& c) {
    if (!p.m || !p.n || !p.batch) return;
    if (!handle_) check_library(mcblasCreate(&handle_)), check_library(mcblasSetStream(handle_, streams_[0]));
    const float one = 1, before = p.adds;
    const int32_t whole_one = 1, whole_before = p.adds;
    const bool whole = c.type == Type::i32;
    const auto compute = whole ? MCBLAS_COMPUTE_32I
                               : x.type == Type::f32 ? MCBLAS_COMPUTE_32F_PEDANTIC : MCBLAS_COMPUTE_32F;
    const auto least = [](int64_t n) { return (int)(n > 0 ? n : 1); };
    for (int64_t size : {p.m, p.n, p.k, p.ld_x, p.ld_y, p.ld_c, p.batch})
      if (size > INT32_MAX) fail("a matrix product cannot be asked for", "the matrix library counts to 2147483647");
    check_library(mcblasGemmStridedBatchedEx(
        handle_, p.transposed_x ? MCBLAS_OP_T : MCBLAS_OP_N, p.transposed_y ? MCBLAS_OP_T : MCBLAS_OP_N, p.m, p.n, p.k,
        whole ? (const void*)&whole_one : &one, x.data(), library_type(x.type), least(p.ld_x), p.stride_x, y.data(),
        library_type(y.type), least(p.ld_y), p.stride_y, whole ? (const void*)&whole_before : &before, c.data(),
        library_type(c.type), least(p.ld_c), p.stride_c, p.batch, compute, MCBLAS_GEMM_DEFAULT));
  }
#endif

 private:
  // Blocks of a size that were freed are used again: what is launched later waits for what was launched before.
  char* take(int64_t size) {
    std::vector<char*>& there = free_[size];
    if (!there.empty()) {
      char* address = there.back();
      there.pop_back();
      return address;
    }
    void* made = nullptr;
#ifdef SB_EMULATOR
    if (posix_memalign(&made, 256, size)) fail("out of memory", std::to_string(size) + " bytes");
#else
    if (mcMalloc(&made, size) == mcSuccess) return static_cast<char*>(made);
    check(mcStreamSynchronize(streams_[0]), "mcStreamSynchronize");  // kernels may still use what is free
    for (auto& blocks : free_) {
      for (char* block : blocks.second) check(mcFree(block), "mcFree");
      blocks.second.clear();
    }
    check(mcMalloc(&made, size), "mcMalloc");
#endif
    return static_cast<char*>(made);
  }

#ifdef SB_EMULATOR
  static constexpr int64_t SPREAD = 2;  // behind each temporary lies as much memory that is nobody's
#else
  static constexpr int64_t SPREAD = 1;
#endif
  std::map<int64_t, std::vector<char*>> free_;
#ifdef SB_EMULATOR
  // What an entry point on several streams puts into them runs at its end: of what may run next by streams and events the
  // first, the last or any, by the order of threads. On one stream it runs at once.
  struct Operation {
    int before[2];  // in the stream, and by an event
    std::function<void()> run;
    bool done;
  };
  struct Stream {
    int last = -1;  // operation
    bool begun = false;
  };
  std::vector<Operation> operations_;
  std::vector<Stream> streams_ = {{-1, true}};
  std::map<int, int> events_;  // the operation that each stands for
  std::vector<std::pair<char*, int64_t>> fresh_;  // memory that the next operation finds as nothing has written it
  unsigned random_ = 1;
  int order_ = 0;

  int put(int stream, int event, std::function<void()> run) {
    std::vector<std::pair<char*, int64_t>> fresh;
    if (run) fresh.swap(fresh_);
    const auto work = [run, fresh] {
      for (auto block : fresh)
        for (int64_t i = 0; i < block.second; i += 2) memcpy(block.first + i, "\xcd\xff", 2);
      if (run) run();
    };
    if (streams_.size() == 1) return work(), -1;
    operations_.push_back({{streams_[stream].last, event}, work, false});
    return streams_[stream].last = operations_.size() - 1;
  }

  void finish() {
    for (size_t count = 0; count < operations_.size(); ++count) {
      std::vector<size_t> ready;
      for (size_t i = 0; i < operations_.size(); ++i) {
        bool can = !operations_[i].done;
        for (int before : operations_[i].before) can = can && (before < 0 || operations_[before].done);
        if (can) ready.push_back(i);
      }
      random_ = random_ * 1103515245 + 12345;
      const size_t next = ready[order_ == 0 ? 0 : order_ == 1 ? ready.size() - 1 : (random_ >> 16) % ready.size()];
      operations_[next].run();
      operations_[next].done = true;
    }
    operations_.clear();
    streams_[0].last = -1;
  }

  static double get(const Buffer& b, int64_t i) {
    switch (b.type) {
      case Type::f64: return reinterpret_cast<const double*>(b.data())[i];
      case Type::f32: return reinterpret_cast<const float*>(b.data())[i];
      case Type::f16: return __half2float(reinterpret_cast<const half*>(b.data())[i]);
      case Type::bf16: return __bfloat162float(reinterpret_cast<const maca_bfloat16*>(b.data())[i]);
      case Type::i32: return reinterpret_cast<const int32_t*>(b.data())[i];
      default: return reinterpret_cast<const int8_t*>(b.data())[i];
    }
  }
  static void put(const Buffer& b, int64_t i, double value) {
    switch (b.type) {
      case Type::f64: reinterpret_cast<double*>(b.data())[i] = value; return;
      case Type::f32: reinterpret_cast<float*>(b.data())[i] = (float)value; return;
      case Type::f16: reinterpret_cast<half*>(b.data())[i] = __float2half((float)value); return;
      case Type::bf16: reinterpret_cast<maca_bfloat16*>(b.data())[i] = __float2bfloat16((float)value); return;
      default: reinterpret_cast<int32_t*>(b.data())[i] = (int32_t)(int64_t)value; return;
    }
  }
#else
  std::vector<mcStream_t> streams_;
  std::vector<mcEvent_t> events_;
  static mcStream_t new_stream() {
    mcStream_t made;
    check(mcStreamCreateWithFlags(&made, mcStreamNonBlocking), "mcStreamCreateWithFlags");
    return made;
  }
  static void check(mcError_t status, const char* what) {
    if (status != mcSuccess)
      fail(std::string(what) + " failed on the card",
           std::string(mcGetErrorName(status)) + ": " + mcGetErrorString(status));
  }
#ifdef SB_LIBRARY
  mcblasHandle_t handle_ = nullptr;
  template <class Status>
  static void check_library(Status status) {
    if (status) fail("the matrix library failed", "it returned " + std::to_string((int)status));
  }
  static auto library_type(Type type) -> decltype(MACA_R_32F) {
    return type == Type::f16 ? MACA_R_16F : type == Type::bf16 ? MACA_R_16BF : type == Type::i8 ? MACA_R_8I
           : type == Type::i32 ? MACA_R_32I : MACA_R_32F;
  }
#endif
#endif
};

// A file, mapped.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY);
    struct stat facts;
    if (file < 0 || fstat(file, &facts)) fail("cannot read " + path, strerror(errno));
    bytes_ = facts.st_size;
    if (bytes_) {
      void* place = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
      if (place == MAP_FAILED) fail("cannot map " + path, strerror(errno));
      start_ = static_cast<const char*>(place);
    }
    close(file);
    path_ = path;
  }
  const char* at(int64_t offset, int64_t bytes) const {
    if (offset < 0 || bytes < 0 || offset > bytes_ || bytes > bytes_ - offset) fail(path_ + " is too short", "it has " + std::to_string(bytes_) + " bytes");
    return start_ + offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  const char* start_ = nullptr;
  int64_t bytes_ = 0;
  std::string path_;
};

// Reads an array that numpy.save wrote; its type and number of axes must be the declared ones.
inline Buffer read_npy(Machine& machine, const std::string& path, Type type, const Shape& declared) {
  const Mapping file(path);
  if (file.bytes() < 12 || memcmp(file.at(0, 6), "\x93NUMPY", 6)) fail(path + " is no .npy file", "its first bytes differ");
  const unsigned char* head = reinterpret_cast<const unsigned char*>(file.at(0, 12));
  const bool old = head[6] == 1;
  const int64_t length = old ? head[8] | head[9] << 8 : head[8] | head[9] << 8 | head[10] << 16 | (int64_t)head[11] << 24;
  const int64_t start = old ? 10 : 12;
  const std::string text(file.at(start, length), length);
  const std::string wanted = std::string("'") + npy_name(type) + "'";
  if (text.find(wanted) == std::string::npos) fail(path + " has another type", text + ", expected " + wanted);
  if (text.find("'fortran_order': False") == std::string::npos) fail(path + " is in Fortran order", "save it in C order");
  Shape shape;
  const size_t from = text.find("'shape': (") + 10, to = text.find(')', from);
  for (size_t i = from; i < to;) {
    if (text[i] >= '0' && text[i] <= '9') {
      char* end;
      shape.push_back(strtoll(text.c_str() + i, &end, 10));
      i = end - text.c_str();
    } else {
      ++i;
    }
  }
  bool fits = shape.size() == declared.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = declared[i] < 0 || declared[i] == shape[i];
  if (!fits) fail(path + " has another shape", text);
  return machine.upload(type, shape, file.at(start + length, count_of(shape) * size_of(type)));
}

inline void write_npy(Machine& machine, const std::string& path, const Buffer& buffer) {
  std::string shape;
  for (int64_t size : buffer.shape) shape += std::to_string(size) + ",";
  std::string text = std::string("{'descr': '") + npy_name(buffer.type) + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  text.append(63 - (10 + text.size()) % 64, ' ').append("\n");
  const int64_t bytes = count_of(buffer.shape) * size_of(buffer.type);
  std::vector<char> data(bytes);
  machine.download(data.data(), buffer.data(), bytes);
  const std::string unfinished = path + ".tmp";
  FILE* file = fopen(unfinished.c_str(), "wb");
  if (!file) fail("cannot write " + path, strerror(errno));
  const unsigned char head[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(text.size() & 255), (unsigned char)(text.size() >> 8)};
  const bool whole = fwrite(head, 1, sizeof head, file) == sizeof head &&
                     fwrite(text.data(), 1, text.size(), file) == text.size() &&
                     fwrite(data.data(), 1, bytes, file) == (size_t)bytes && !fflush(file);
  const int error = errno;
  if (fclose(file) || !whole || rename(unfinished.c_str(), path.c_str())) {
    const int reason = whole ? errno : error;
    unlink(unfinished.c_str());
    fail("cannot write " + path, strerror(reason));
  }
}

}  // namespace sb_host
