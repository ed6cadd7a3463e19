// The lanes of a simdgroup as fibers, and the simdgroup functions through which they meet.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

namespace fibers {

struct Lane {
    ucontext_t begin;  // with a stack of its own
    jmp_buf go_on;  // much cheaper than swapcontext, which asks the kernel twice
    char stack[1 << 16];
    bool begun;  // once for all threads that it runs: to begin asks the kernel
    const char* waits_in;  // the function whose call it has come to; null when a thread has ended
    unsigned turn;  // exchanges so far
    unsigned char operands[2][16];  // of even and of odd turns
};
static Lane lanes[32];
static jmp_buf scheduler;
static unsigned current, count;
static void* body;
static void (*enter)(void*, unsigned);

inline void start() {
    for (;;) {
        enter(body, current);
        lanes[current].waits_in = nullptr;
        if (!_setjmp(lanes[current].go_on)) _longjmp(scheduler, 1);
    }
}

// Let the current lane run until it comes to a simdgroup function, or its thread ends.
inline void resume() {
    Lane& lane = lanes[current];
    if (_setjmp(scheduler)) return;
    if (lane.begun) _longjmp(lane.go_on, 1);
    lane.begun = true;
    getcontext(&lane.begin);
    lane.begin.uc_stack.ss_sp = lane.stack;
    lane.begin.uc_stack.ss_size = sizeof lane.stack;
    makecontext(&lane.begin, start, 0);
    setcontext(&lane.begin);
}

// Back to the scheduler until every lane has come to a call of the same function.
inline void meet(const char* function) {
    lanes[current].waits_in = function;
    if (!_setjmp(lanes[current].go_on)) _longjmp(scheduler, 1);
}

template <class Body, class Announce>
void run(unsigned lane_count, bool backwards, Body each, Announce announce) {
    count = lane_count;
    body = &each;
    enter = [](void* self, unsigned lane) { (*static_cast<Body*>(self))(lane); };
    for (unsigned i = 0; i < count; ++i) lanes[i].turn = 0;
    do {
        for (unsigned i = 0; i < count; ++i) {
            current = backwards ? count - 1 - i : i;
            announce(current);
            resume();
        }
        for (unsigned lane = 1; lane < count; ++lane)
            if (lanes[lane].waits_in != lanes[0].waits_in) __builtin_trap();  // not all took part
    } while (lanes[0].waits_in);
}

// What `function` of each lane's `x` is to this lane: `pick` chooses from the operands, by lane.
// A lane that is a turn ahead writes to the other place: not all may have read its last operand.
template <class T, class Pick>
T exchange(const char* function, T x, Pick pick) {
    static_assert(sizeof(T) <= sizeof lanes[0].operands[0]);
    const unsigned place = lanes[current].turn++ % 2;
    __builtin_memcpy(lanes[current].operands[place], &x, sizeof x);
    meet(function);
    return pick([=](unsigned lane) {
        if (lane >= count) __builtin_trap();
        T value;
        __builtin_memcpy(&value, lanes[lane].operands[place], sizeof value);
        return value;
    });
}

}  // namespace fibers

namespace metal {

template <class T>
T simd_shuffle_xor(T x, unsigned short mask) {
    return fibers::exchange("simd_shuffle_xor", x,
                            [=](auto of) { return of(fibers::current ^ mask); });
}

template <class T>
T simd_broadcast(T x, unsigned short lane) {
    return fibers::exchange("simd_broadcast", x, [=](auto of) { return of(lane); });
}

template <class T>
T simd_sum(T x) {
    return fibers::exchange("simd_sum", x, [](auto of) {
        T sum = of(0);
        for (unsigned lane = 1; lane < fibers::count; ++lane) sum += of(lane);
        return sum;
    });
}

}  // namespace metal
