// Memory of packed weights, and memory of the graph's weights that is not needed once they are packed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace roundexport {

// Zeroed bytes at a multiple of 64, in huge pages where the system has them: a core that streams 4 KiB pages waits for
// them.  Pieces lie one behind the other in large mappings, since a huge page of its own for a small weight is mostly
// empty.  Null: memory is short.  Any thread.
uint8_t* take(size_t bytes);

// What `take` gave.  The pages go back to the system at once, the addresses with the last piece of their mapping.
void give_back(uint8_t* at, size_t bytes);

// Takes pages of a mapped file out of this process; who reads them again finds them in the file.  Pages that are not a
// file's, or were written to, stay as they are, and so does everything where the system does not tell which are which.
void forget_file_pages(const void* at, size_t bytes);

}  // namespace roundexport
