// The lanes of a simdgroup as fibers, and the simdgroup functions through which they meet.
#pragma once
#include <ucontext.h>

namespace fibers {

struct Lane {
    ucontext_t context;
    char stack[1 << 16];
    const char* waits_in;  // the function whose call it has come to; null when it has ended
    unsigned char operand[16];
};
static Lane lanes[32];
static ucontext_t scheduler;
static unsigned current, count;
static void* body;
static void (*enter)(void*, unsigned);

inline void start() {
    enter(body, current);
    lanes[current].waits_in = nullptr;
}

// Back to the scheduler until every lane has come to a call of the same function.
inline void meet(const char* function) {
    lanes[current].waits_in = function;
    swapcontext(&lanes[current].context, &scheduler);
}

template <class Body, class Announce>
void run(unsigned lane_count, bool backwards, Body each, Announce announce) {
    count = lane_count;
    body = &each;
    enter = [](void* self, unsigned lane) { (*static_cast<Body*>(self))(lane); };
    for (unsigned lane = 0; lane < count; ++lane) {
        getcontext(&lanes[lane].context);
        lanes[lane].context.uc_stack.ss_sp = lanes[lane].stack;
        lanes[lane].context.uc_stack.ss_size = sizeof lanes[lane].stack;
        lanes[lane].context.uc_link = &scheduler;
        makecontext(&lanes[lane].context, start, 0);
    }
    do {
        for (unsigned i = 0; i < count; ++i) {
            current = backwards ? count - 1 - i : i;
            announce(current);
            swapcontext(&scheduler, &lanes[current].context);
        }
        for (unsigned lane = 1; lane < count; ++lane)
            if (lanes[lane].waits_in != lanes[0].waits_in) __builtin_trap();  // not all lanes took part
    } while (lanes[0].waits_in);
}

// What `function` of each lane's `x` is to this lane: `pick` chooses from the operands, by lane.
template <class T, class Pick>
T exchange(const char* function, T x, Pick pick) {
    static_assert(sizeof(T) <= sizeof lanes[0].operand);
    __builtin_memcpy(lanes[current].operand, &x, sizeof x);
    meet(function);
    T found = pick([](unsigned lane) {
        if (lane >= count) __builtin_trap();
        T value;
        __builtin_memcpy(&value, lanes[lane].operand, sizeof value);
        return value;
    });
    meet(function);  // no lane may overwrite its operand before all have read it
    return found;
}

}  // namespace fibers

namespace metal {

template <class T>
T simd_shuffle_xor(T x, unsigned short mask) {
    return fibers::exchange("simd_shuffle_xor", x, [=](auto of) { return of(fibers::current ^ mask); });
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
