//! CPU kernels on raw slices: matrix products, experts, attention, norms, losses, optimiser steps.
