// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"

namespace featherweight {

// The same graph with fewer nodes, whatever the shapes: BatchNormalization folded into the weights before it, activations
// and residual additions taken into the node that makes their input (Node::finish), GELU, SiLU and hard-swish recognised in
// the pieces that exporters write them in, and nodes that nothing reads left out.
Graph fused(Graph graph);

}  // namespace featherweight
