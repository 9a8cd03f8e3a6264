/* The kernel with what every processor of the platform has. */
#define VARIANT baseline
#include "kernel.h"
