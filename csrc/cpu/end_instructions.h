// Ends what allow_instructions.h began.

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
