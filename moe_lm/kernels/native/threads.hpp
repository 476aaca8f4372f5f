// A loop over several threads that waits for none that is late.
//
// A step of decoding has dozens of loops of 20 us. OpenMP waits in each until every thread has come, and on a machine
// that is busy with other work, where a thread comes when the scheduler lets it, 400 tokens/s became 7 (eval/LOG.md).
// Here each thread takes the next block, and the caller goes on when all blocks are done: a thread that sleeps through
// the loop has taken none.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#ifdef _OPENMP
#include <omp.h>  // for the number of threads that torch was told to use
#endif

struct Helpers {
    static constexpr int PATIENCE = 2000;  // looks, about 50 us, before a helper goes to sleep

    void (*run)(const void*, int64_t) = nullptr;  // this, `body` and `blocks` change only while the loop is closed and
    const void* body = nullptr;                   // nobody is inside
    int64_t blocks = 0;
    std::atomic<bool> taken{false}, open{false};
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<int> inside{0}, asleep{0}, wanted{0};
    std::atomic<uint64_t> loops{0};
    std::mutex mutex;
    std::condition_variable wake;
    int started = 0;

    void work() {
        for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
            run(body, block);
            done.fetch_add(1);
        }
    }

    void help(int number) {
        uint64_t seen = 0;
        for (;;) {
            for (int look = 0; look < PATIENCE && loops.load() == seen; look++) pause();
            if (loops.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                asleep.fetch_add(1);
                wake.wait(lock, [&] { return loops.load() != seen; });
                asleep.fetch_sub(1);
            }
            seen = loops.load();
            if (number >= wanted.load()) continue;
            inside.fetch_add(1);
            if (open.load()) work();
            inside.fetch_sub(1);
        }
    }

    // Whether the loop ran here; not while another thread's does, or somebody is still on the way out of the last one.
    bool loop(int64_t count, int threads, void (*function)(const void*, int64_t), const void* context) {
        if (taken.exchange(true)) return false;
        if (inside.load() != 0) {
            taken.store(false);
            return false;
        }
        for (; started < threads - 1; started++) std::thread(&Helpers::help, this, started).detach();
        run = function, body = context, blocks = count;
        next.store(0), done.store(0), wanted.store(threads - 1);
        open.store(true);
        loops.fetch_add(1);
        if (asleep.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex); }
            wake.notify_all();
        }
        work();
        open.store(false);
        while (done.load() < blocks) std::this_thread::yield();
        taken.store(false);
        return true;
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
};

static Helpers& helpers() {
    static Helpers* all = new Helpers;  // never deleted: its threads end with the process
    return *all;
}

static int threads_of_torch() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return (int)std::thread::hardware_concurrency();
#endif
}

// body(0) ... body(blocks - 1), on several threads where that is `worth` it
template <class Body>
static void in_blocks(int64_t blocks, bool worth, const Body& body) {
    if (worth && blocks > 1) {
        int threads = threads_of_torch();
        auto run = [](const void* context, int64_t block) { (*(const Body*)context)(block); };
        if (threads > 1 && helpers().loop(blocks, threads, run, &body)) return;
    }
    for (int64_t block = 0; block < blocks; block++) body(block);
}
