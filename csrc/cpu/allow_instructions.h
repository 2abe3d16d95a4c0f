// From here to end_instructions.h the compiler may take CLIPFAST_INSTRUCTIONS beside the build's, as its target attribute
// has them. Standard headers come before: what they bring is for every CPU. What comes between is local to the file, so
// that no CPU without the instructions meets it.

#define CLIPFAST_PRAGMA(text) _Pragma(#text)
#define CLIPFAST_ALLOW_CLANG(names) \
    CLIPFAST_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define CLIPFAST_ALLOW_GCC(names) CLIPFAST_PRAGMA(GCC target(names))
#if defined(__clang__)
CLIPFAST_ALLOW_CLANG(CLIPFAST_INSTRUCTIONS)
#else
#pragma GCC push_options
CLIPFAST_ALLOW_GCC(CLIPFAST_INSTRUCTIONS)
#endif
