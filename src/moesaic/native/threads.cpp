#include <omp.h>

// What the calling thread computes is computed by itself alone from now on.
extern "C" void compute_alone() { omp_set_num_threads(1); }
