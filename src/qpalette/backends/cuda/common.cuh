// What the kernels of this folder share: types, loads and stores of activations, dependent launches, the matrix instruction.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

// A kernel may start before the one before it has ended. What depends on it comes after this.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// After the wait, so that whatever starts then may rely on all kernels before this one, as torch.compile's kernels do.
// Only a kernel whose successor is one of this folder, and waits itself, calls it earlier.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u16 to_bfloat16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

template <bool BFLOAT16>
__device__ __forceinline__ u16 to_bits(float value) {
    return BFLOAT16 ? to_bfloat16(value) : to_half(value);
}

// Types of activations: 0 float16, 1 bfloat16, 2 float32.
__device__ __forceinline__ float load(const void *x, size_t i, int type) {
    if (type == 2) return ((const float *)x)[i];
    const u16 bits = ((const u16 *)x)[i];
    return type == 1 ? __uint_as_float((u32)bits << 16) : half_to_float(bits);
}

__device__ __forceinline__ void store(void *y, size_t i, int type, float value) {
    if (type == 2) ((float *)y)[i] = value;
    else ((u16 *)y)[i] = type == 1 ? to_bfloat16(value) : to_half(value);
}

// sum += a b of a 16 x 16 tile and eight columns: m16n8k16, of float16 or bfloat16.
template <bool BFLOAT16 = false>
__device__ __forceinline__ void multiply_tile(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (BFLOAT16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
