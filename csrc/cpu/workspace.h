// Memory that calls use and give back, so that the next one finds its pages mapped.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace clipfast::cpu {

// Blocks that wait for their next use: at most `most_blocks`, of at most `most_bytes` together. Threads that call at
// the same time each get a block of their own.
class WorkspacePool {
public:
    struct Block {
        void* data;
        size_t bytes;
    };
    Block take(size_t bytes) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (size_t i = 0; i < free_.size(); ++i)
                if (free_[i].bytes >= bytes) {
                    const Block block = free_[i];
                    free_.erase(free_.begin() + i);
                    return block;
                }
        }
        bytes = (bytes + 4095) / 4096 * 4096;
        void* data = std::aligned_alloc(4096, bytes);
        if (!data) throw std::bad_alloc();
        return {data, bytes};
    }
    void give_back(Block block) {
        std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(block);
        // the smallest go first: a larger one serves every call that they serve
        std::sort(free_.begin(), free_.end(), [](const Block& a, const Block& b) { return a.bytes > b.bytes; });
        while (free_.size() > most_blocks || bytes_() > most_bytes) drop_();
    }
    size_t release() {
        std::lock_guard<std::mutex> lock(mutex_);
        const size_t bytes = bytes_();
        while (!free_.empty()) drop_();
        return bytes;
    }

private:
    static constexpr size_t most_blocks = 8, most_bytes = size_t(256) << 20;
    size_t bytes_() const {
        size_t sum = 0;
        for (const Block& block : free_) sum += block.bytes;
        return sum;
    }
    void drop_() {
        std::free(free_.back().data);
        free_.pop_back();
    }
    std::mutex mutex_;
    std::vector<Block> free_;
};

// never destroyed: a thread may still compute while the process ends
inline WorkspacePool& workspace_pool() {
    static WorkspacePool* pool = new WorkspacePool;
    return *pool;
}

// One call's memory, handed out piece by piece.
class Workspace {
public:
    explicit Workspace(size_t bytes) : block_(workspace_pool().take(bytes)) {}
    ~Workspace() { workspace_pool().give_back(block_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
    void* piece(size_t bytes) {
        void* at = static_cast<char*>(block_.data) + used_;
        used_ += rounded(bytes);
        return at;
    }

private:
    WorkspacePool::Block block_;
    size_t used_ = 0;
};

}  // namespace clipfast::cpu
