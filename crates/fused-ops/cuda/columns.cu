// Rows with more or fewer columns: resize_columns_BYTES, for words of so many bytes.
#include "columns.cuh"

using namespace fused_ops;

#define RESIZE_COLUMNS(bytes, Word) \
    KERNEL((kColumnsThreads), resize_columns_##bytes, ColumnsParams, resize_columns<Word>(params))

RESIZE_COLUMNS(2, uint16_t)
RESIZE_COLUMNS(4, uint32_t)
RESIZE_COLUMNS(8, uint2)
RESIZE_COLUMNS(16, uint4)
