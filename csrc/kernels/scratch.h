// Memory that a thread keeps between calls, so that an op allocates only while it grows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sg {

// At a multiple of 64. Large blocks ask for huge pages: a step that touches new memory then faults rarely.
inline void* allocate_scratch(int64_t bytes) {
  constexpr int64_t HUGE = int64_t{2} << 20;
  const int64_t alignment = bytes >= HUGE ? HUGE : 64;
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(rounded));
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == HUGE) madvise(data, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
  return data;
}

// One growing block. Declare it thread_local; its contents do not outlive a call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = nullptr;
      data_ = allocate_scratch(bytes);
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// A vector of plain values over such a block; clear() keeps the room.
template <typename T>
class ScratchVector {
 public:
  void clear() { size_ = 0; }
  void push_back(const T& value) {
    if (size_ == capacity_) grow(size_ + 1);
    data_[size_++] = value;
  }
  // Contents are arbitrary where the size grew.
  void resize(int64_t size) {
    if (size > capacity_) grow(size);
    size_ = size;
  }
  int64_t size() const { return size_; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  ~ScratchVector() { std::free(data_); }
  ScratchVector() = default;
  ScratchVector(const ScratchVector&) = delete;
  ScratchVector& operator=(const ScratchVector&) = delete;

 private:
  void grow(int64_t needed) {
    int64_t capacity = capacity_ < 16 ? 16 : 2 * capacity_;
    if (capacity < needed) capacity = needed;
    auto* data = static_cast<T*>(allocate_scratch(capacity * static_cast<int64_t>(sizeof(T))));
    for (int64_t i = 0; i < size_; ++i) data[i] = data_[i];
    std::free(data_);
    data_ = data;
    capacity_ = capacity;
  }

  T* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

}  // namespace sg
