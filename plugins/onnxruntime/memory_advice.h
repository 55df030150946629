// Tells the operating system how a table is read.
#pragma once

#include <cstddef>

namespace umv2::ort {

// Rows are hit at random: reading ahead around one, 64 KiB and more, would fill the page cache with rows that nobody
// asked for. Advice only; where the system knows none, nothing happens.
void advise_random(const void* data, size_t size);

}  // namespace umv2::ort
