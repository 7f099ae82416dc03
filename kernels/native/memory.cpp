// Pieces of large mappings, and Linux' list of which page is a file's (Documentation/admin-guide/mm/pagemap.rst).
#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>

namespace roundexport {
namespace {

constexpr size_t kHuge = size_t{2} << 20, kMapping = size_t{64} << 20, kAlignment = 64;
constexpr uint64_t kPresent = uint64_t{1} << 63, kOfFile = uint64_t{1} << 61;  // a page's 64 bits in pagemap

size_t up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

struct Mapping {
  size_t bytes;
  uintptr_t next;  // first address that was not given yet
  size_t pieces;   // given and not back
};

struct Mappings {
  std::mutex guard;
  std::map<uintptr_t, Mapping> by_address;
  uintptr_t newest = 0;  // pieces are taken from this one
};

Mappings& mappings() {
  static Mappings* all = new Mappings;  // never destroyed: sessions may outlive this library's own objects
  return *all;
}

// A mapping with room for a piece behind its first multiple of a huge page.
bool map_for(Mappings& all, size_t bytes) {
  const size_t size = up(bytes > kMapping ? bytes : kMapping, kHuge) + kHuge;
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return false;
#ifdef MADV_HUGEPAGE
  madvise(at, size, MADV_HUGEPAGE);
#endif
  all.newest = reinterpret_cast<uintptr_t>(at);
  all.by_address[all.newest] = {size, up(all.newest, kHuge), 0};
  return true;
}

}  // namespace

uint8_t* take(size_t bytes) {
  Mappings& all = mappings();
  const std::lock_guard<std::mutex> lock(all.guard);
  bytes = up(bytes, kAlignment);
  auto found = all.by_address.find(all.newest);
  if (found == all.by_address.end() || found->first + found->second.bytes - found->second.next < bytes) {
    if (!map_for(all, bytes)) return nullptr;
    found = all.by_address.find(all.newest);
  }
  Mapping& mapping = found->second;
  uint8_t* piece = reinterpret_cast<uint8_t*>(mapping.next);
  mapping.next += bytes, mapping.pieces++;
  return piece;
}

void give_back(uint8_t* piece, size_t bytes) {
  Mappings& all = mappings();
  const std::lock_guard<std::mutex> lock(all.guard);
  const uintptr_t at = reinterpret_cast<uintptr_t>(piece);
  const auto found = --all.by_address.upper_bound(at);
  if (--found->second.pieces == 0) {
    munmap(reinterpret_cast<void*>(found->first), found->second.bytes);
    all.by_address.erase(found);
    return;
  }
  const uintptr_t first = up(at, page_size()), last = (at + bytes) / page_size() * page_size();  // this piece's alone
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

void forget_file_pages(const void* start, size_t bytes) {
  const int list = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (list < 0) return;
  const size_t page = page_size(), last = (reinterpret_cast<uintptr_t>(start) + bytes + page - 1) / page;
  for (size_t first = reinterpret_cast<uintptr_t>(start) / page; first < last;) {
    uint64_t pages[512];
    const size_t wanted = last - first < 512 ? last - first : 512;
    const ssize_t read = pread(list, pages, wanted * sizeof(uint64_t), static_cast<off_t>(first * sizeof(uint64_t)));
    if (read != static_cast<ssize_t>(wanted * sizeof(uint64_t))) break;
    for (size_t i = 0, end; i < wanted; i = end + 1) {
      for (end = i; end < wanted && (pages[end] & kPresent) && (pages[end] & kOfFile);) end++;
      if (end > i) madvise(reinterpret_cast<void*>((first + i) * page), (end - i) * page, MADV_DONTNEED);
    }
    first += wanted;
  }
  close(list);
}

}  // namespace roundexport
