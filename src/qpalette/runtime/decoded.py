"""What a processor has in float32 at a time where it decodes a matrix to multiply it with many tokens: whatever their
number and the matrix. Plans for a memory count it."""

PIECE = 256  # tokens
STRIP = 1 << 20  # weights, in whole rows of blocks
BLOCK_ROWS = 64
