// The scheduler of cuda_emulator.h: fibers, barriers, warp operations, shared memory.
#include "cuda_emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#if !defined(__x86_64__) || defined(ORIN_EMULATE_UCONTEXT)
#define ORIN_UCONTEXT 1
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace orin::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxShared = 163 * 1024;  // of a block on sm_87
constexpr size_t kRedZone = 256;           // behind dynamic shared memory
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xff, kRedByte = 0xa5;

// ---- switching stacks ----

#ifdef ORIN_UCONTEXT
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#else
// swapcontext asks the kernel for the signal mask each time; this saves what the ABI says a callee must save.
struct Context {
  void* stack = nullptr;
};
extern "C" void orin_emulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type orin_emulator_switch, @function
orin_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size orin_emulator_switch, .-orin_emulator_switch
)");
void switch_to(Context& from, Context& to) { orin_emulator_switch(&from.stack, to.stack); }
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the entry's return address, never used; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack = top;
}
#endif

// ---- a block ----

enum class State { kReady, kWarp, kBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Fiber {
  Context context;
  State state;
  uint3 thread;
  int lane, warp;
  const char* waits_for;
  std::vector<Copy> copies;      // cp.async, oldest first
  std::vector<size_t> groups;    // how many copies each committed group has, oldest first
  size_t uncommitted;
};

// A warp operation under way. Those of one warp have disjoint masks, so the lowest lane names one.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* operation = nullptr;
  void* operands[kLanes];
};

struct Static {
  const void* key;
  size_t offset, bytes;
};

std::mutex one_launch;
std::string message;
uint64_t seed = 0, random_state = 0;
int sm_count = 16;

Context scheduler;
std::vector<Fiber> fibers;
std::vector<Meeting> meetings;  // [warp * 32 + lowest lane]
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
bool failed = false;
int live = 0, at_barrier = 0;
char* stacks = nullptr;
alignas(128) char shared_memory[kMaxShared + kRedZone];
alignas(128) char static_memory[48 * 1024];
std::vector<Static> statics;
size_t static_used = 0;

uint32_t random_below(uint32_t bound) {  // xorshift64*
  random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
  return uint32_t((random_state * 0x2545F4914F6CDD1Dull) >> 33) % bound;
}

template <typename T>
void shuffle_order(std::vector<T>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(uint32_t(i))]);
}

void to_scheduler() { switch_to(current->context, scheduler); }

void block_until(State state, const char* what) {
  current->state = state;
  current->waits_for = what;
  to_scheduler();
}

void fiber_main() {
  (*body)();
  current->state = State::kDone;
  to_scheduler();
}

void allocate_stacks() {
  if (stacks) return;
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  stacks = static_cast<char*>(memory);
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStackBytes, page, PROT_NONE);  // overflow: SIGSEGV
}

void start_block(size_t shared_bytes) {
  std::memset(shared_memory, kPoison, shared_bytes);
  std::memset(shared_memory + shared_bytes, kRedByte, kRedZone);
  std::memset(static_memory, kPoison, static_used);
  statics.clear();
  static_used = 0;
  unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  fibers.resize(threads);
  meetings.assign(size_t(threads + kLanes - 1) / kLanes * kLanes, Meeting());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    prepare(fiber.context, stacks + i * kStackBytes, fiber_main);
    fiber.state = State::kReady;
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.lane = int(i) % kLanes, fiber.warp = int(i) / kLanes;
    fiber.copies.clear(), fiber.groups.clear(), fiber.uncommitted = 0;
  }
  live = int(threads), at_barrier = 0;
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  switch_to(scheduler, fiber.context);
  if (fiber.state == State::kDone) --live;
  if (fiber.state == State::kBarrier) ++at_barrier;
}

// Lets each ready lane of the warp run to its next meeting point. Whether any was ready.
bool step_warp(int warp, std::vector<int>& lane_order) {
  bool any = false;
  if (seed) shuffle_order(lane_order);
  for (int lane : lane_order) {
    size_t i = size_t(warp) * kLanes + size_t(lane);
    if (i >= fibers.size() || fibers[i].state != State::kReady) continue;
    resume(fibers[i]);
    any = true;
    if (failed) return true;
  }
  return any;
}

void report_stuck() {
  std::string waiting;
  int count = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::kDone || fiber.state == State::kReady || ++count > 3) continue;
    waiting += " thread " + std::to_string(fiber.warp * kLanes + fiber.lane) + " waits in " + fiber.waits_for + ";";
  }
  message = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
            std::to_string(blockIdx.z) + ") is stuck:" + waiting + " the threads it waits for do not come";
  failed = true;
}

// In order, every warp runs as far as it can: that shows a reader ahead of its writer. With a seed, in bursts.
void run_block() {
  int warps = int((fibers.size() + kLanes - 1) / kLanes);
  std::vector<int> warp_order(size_t(warps), 0), lane_order(kLanes);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::iota(lane_order.begin(), lane_order.end(), 0);
  while (live > 0 && !failed) {
    bool any = false;
    if (seed) shuffle_order(warp_order);
    for (int warp : warp_order) {
      uint32_t burst = seed ? (random_below(4) ? 1 + random_below(6) : 1u << 30) : 1u << 30;
      for (uint32_t i = 0; i < burst && !failed && step_warp(warp, lane_order); ++i) any = true;
    }
    if (failed) return;
    if (live > 0 && at_barrier == live) {
      for (Fiber& fiber : fibers)
        if (fiber.state == State::kBarrier) fiber.state = State::kReady;
      at_barrier = 0;
    } else if (!any && live > 0) {
      report_stuck();
    }
  }
}

void check_red_zone(size_t shared_bytes) {
  for (size_t i = 0; i < kRedZone && !failed; ++i) {
    if (static_cast<unsigned char>(shared_memory[shared_bytes + i]) == kRedByte) continue;
    message = "a write " + std::to_string(i) + " bytes behind the block's shared memory";
    failed = true;
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = std::string(text) + ", in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
            std::to_string(blockIdx.z) + ") thread " + std::to_string(current->warp * kLanes + current->lane);
  failed = true;
  to_scheduler();
  abort();  // the scheduler never comes back
}

bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  std::lock_guard<std::mutex> lock(one_launch);
  message.clear();
  failed = false;
  size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > kMaxThreads || !blocks || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMaxShared) {
    message = "invalid launch: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads and " +
              std::to_string(shared_bytes) + " bytes of shared memory";
    return false;
  }
  allocate_stacks();
  body = &thread;
  blockDim = block, gridDim = grid;
  random_state = seed * 0x9E3779B97F4A7C15ull + 1;
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t(0));
  if (seed) shuffle_order(order);
  for (size_t i : order) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    start_block(shared_bytes);
    run_block();
    check_red_zone(shared_bytes);
    if (failed) return false;
  }
  return true;
}

const char* error() { return message.c_str(); }
int sms() { return sm_count; }
int lane() { return current->lane; }
void* dynamic_shared() { return shared_memory; }

void* static_shared(const void* key, size_t bytes) {
  for (const Static& one : statics)
    if (one.key == key) return static_memory + one.offset;
  size_t offset = (static_used + 127) / 128 * 128;
  if (offset + bytes > sizeof static_memory) fail("more than 48 KiB of static shared memory");
  static_used = offset + bytes;
  statics.push_back({key, offset, bytes});
  std::memset(static_memory + offset, kPoison, bytes);
  return static_memory + offset;
}

void sync_threads() { block_until(State::kBarrier, "__syncthreads"); }

bool arrive(uint32_t mask, const char* operation, void* mine, void** lanes) {
  int lane = current->lane;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask 0x%08x", operation, lane, mask);
  Meeting& meeting = meetings[size_t(current->warp) * kLanes + size_t(__builtin_ctz(mask))];
  if (!meeting.arrived) meeting.mask = mask, meeting.operation = operation;
  if (meeting.mask != mask || std::strcmp(meeting.operation, operation) != 0)
    fail("%s with mask 0x%08x while other lanes of the warp are at %s with 0x%08x", operation, mask, meeting.operation,
         meeting.mask);
  meeting.arrived |= 1u << lane;
  meeting.operands[lane] = mine;
  if (meeting.arrived != mask) {
    block_until(State::kWarp, operation);
    return false;
  }
  for (int i = 0; i < kLanes; ++i) lanes[i] = mask >> i & 1 ? meeting.operands[i] : nullptr;
  return true;
}

void release(uint32_t mask) {
  size_t first = size_t(current->warp) * kLanes;
  meetings[first + size_t(__builtin_ctz(mask))].arrived = 0;
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) fibers[first + size_t(i)].state = State::kReady;
}

void copy_async(void* to, const void* from, int bytes, int valid) {
  check_aligned(to, size_t(bytes), "cp.async to shared memory");
  if (valid) check_aligned(from, size_t(bytes), "cp.async from global memory");
  current->copies.push_back({to, from, bytes, valid});
  ++current->uncommitted;
}

void copy_async_commit() {
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void copy_async_wait(int pending) {
  Fiber& fiber = *current;
  while (int(fiber.groups.size()) > pending) {
    for (size_t i = 0; i < fiber.groups.front(); ++i) {
      const Copy& copy = fiber.copies[i];
      std::memcpy(copy.to, copy.from, size_t(copy.valid));
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, size_t(copy.bytes - copy.valid));
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + std::ptrdiff_t(fiber.groups.front()));
    fiber.groups.erase(fiber.groups.begin());
  }
}

float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) {
    float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return orin_bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

uint16_t float_to_half(float value) {
  uint32_t bits = orin_bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (bits < 0x38800000) {                                 // below 2^-14: a multiple of 2^-24
    float scaled = orin_bit_cast<float>(bits) * 0x1p24f;
    return uint16_t(sign | uint32_t(std::nearbyint(scaled)));
  }
  uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

}  // namespace orin::emulator

// What tests set: the order (0: ascending) and how many multiprocessors the plans are to see.
extern "C" __attribute__((visibility("default"))) void orin_emulator_configure(uint64_t seed, int sms) {
  orin::emulator::seed = seed;
  orin::emulator::sm_count = sms;
}
extern "C" __attribute__((visibility("default"))) uint16_t orin_emulator_float_to_half(float value) {
  return orin::emulator::float_to_half(value);
}
extern "C" __attribute__((visibility("default"))) float orin_emulator_half_to_float(uint16_t bits) {
  return orin::emulator::half_to_float(bits);
}
