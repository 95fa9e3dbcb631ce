// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"

namespace featherweight {

// The same graph with fewer nodes, whatever the shapes: BatchNormalization folded into the weights before it, activations
// and residual additions taken into the node that makes their input (Node::finish), GELU, SiLU and hard-swish recognised in
// the pieces that exporters write them in, and nodes that nothing reads left out.
//
// Nodes after it may be of ops that the file's opset lacks (Gelu, Swish, RMSNormalization), a LayerNormalization may lack
// its scale, and a MatMul may have a third input: a bias along the last axis.
Graph fused(Graph graph);

// "relu", "+ value, relu", "silu, + value": what a node does to its result before it is stored.
std::string describe(const Graph& graph, const Finish& finish);

}  // namespace featherweight
