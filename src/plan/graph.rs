//! Who needs whom, as one graph of `petgraph`: order, cycles, and what lies above or below a cell.
//!
//! Stages while a manifest is resolved, cells afterwards. Every walk is without recursion, so that no
//! chain is too long, and linear in nodes and edges.

use petgraph::algo::tred::{dag_to_toposorted_adjacency_list, dag_transitive_reduction_closure};
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::{Dfs, DfsPostOrder, EdgeFiltered, EdgeRef, GraphRef, IntoNeighbors, Reversed, Visitable};
use std::collections::BTreeSet;

/// Nodes are numbered from 0 in the order written; an edge goes from a node to one that it needs.
pub struct Graph(DiGraph<(), ()>);

impl Graph {
    /// A graph of as many nodes as `needs` has lists, each with what it needs, each need once.
    pub fn new(needs: impl ExactSizeIterator<Item = Vec<usize>>) -> Graph {
        let mut graph = DiGraph::with_capacity(needs.len(), needs.len());
        for _ in 0..needs.len() {
            graph.add_node(());
        }
        for (node, needs) in needs.enumerate() {
            for need in needs {
                graph.add_edge(NodeIndex::new(node), NodeIndex::new(need), ());
            }
        }
        Graph(graph)
    }

    /// What `node` needs itself, each once.
    pub fn needs(&self, node: usize) -> impl Iterator<Item = usize> {
        self.0.neighbors(NodeIndex::new(node)).map(NodeIndex::index)
    }

    /// Dependencies first, ties in the order written. `Err` is the cycle itself: it starts at its
    /// earliest node and each node needs the next one.
    pub(super) fn order(&self) -> Result<Vec<usize>, Vec<usize>> {
        let mut walk = DfsPostOrder::empty(&self.0);
        let mut order = Vec::with_capacity(self.0.node_count());
        for root in self.0.node_indices() {
            walk.move_to(root);
            while let Some(node) = walk.next(&self.0) {
                // A need that is not done when the node itself is lies on the way to it.
                if self.0.neighbors(node).any(|need| need == node || !walk.finished.contains(need.index())) {
                    return Err(self.cycle(&way(&walk, node)));
                }
                order.push(node.index());
            }
        }
        Ok(order)
    }

    /// The first cycle met on a way of which each node needs the next and some node one before it.
    fn cycle(&self, way: &[usize]) -> Vec<usize> {
        for (at, &node) in way.iter().enumerate() {
            // In the order written; petgraph tells the last edge first.
            let mut needs: Vec<usize> = self.needs(node).collect();
            needs.reverse();
            for need in needs.into_iter().take_while(|need| way.get(at + 1) != Some(need)) {
                if let Some(from) = way[..=at].iter().position(|before| *before == need) {
                    let mut cycle = way[from..=at].to_vec();
                    let first = (0..cycle.len()).min_by_key(|&i| cycle[i]).unwrap_or(0);
                    cycle.rotate_left(first);
                    return cycle;
                }
            }
        }
        Vec::new()
    }

    /// `from` and all that they need, directly or not, going on only past nodes that `past` holds for.
    pub fn above(&self, from: impl IntoIterator<Item = usize>, past: impl Fn(usize) -> bool) -> BTreeSet<usize> {
        reached(&EdgeFiltered::from_fn(&self.0, |edge| past(edge.source().index())), from)
    }

    /// `from` and all that need it, directly or not, going on only to nodes that `to` holds for.
    pub fn below(&self, from: usize, to: impl Fn(usize) -> bool) -> BTreeSet<usize> {
        reached(&EdgeFiltered::from_fn(Reversed(&self.0), |edge| to(edge.target().index())), [from])
    }

    /// The needs of each node less those that follow from its others, in their order. For a graph without cycles.
    pub fn reduced(&self) -> Vec<Vec<usize>> {
        let Ok(mut order) = self.order() else { return Vec::new() };
        order.reverse();
        let order: Vec<NodeIndex> = order.into_iter().map(NodeIndex::new).collect();
        let (sorted, rank) = dag_to_toposorted_adjacency_list::<_, NodeIndex>(&self.0, &order);
        let (reduced, _) = dag_transitive_reduction_closure(&sorted);
        let kept = |node: usize, need: usize| reduced.contains_edge(rank[node], rank[need]);
        let needs = |node: usize| {
            let mut needs: Vec<usize> = self.needs(node).filter(|need| kept(node, *need)).collect();
            needs.reverse();
            needs
        };
        (0..self.0.node_count()).map(needs).collect()
    }
}

/// The nodes from the root of the walk to `node`, which has just ended.
fn way<M>(walk: &DfsPostOrder<NodeIndex, M>, node: NodeIndex) -> Vec<usize>
where
    M: petgraph::visit::VisitMap<NodeIndex>,
{
    // The walk's stack holds nodes it has not come to as well, and those it came to another way twice.
    let on_way = |node: &NodeIndex| walk.discovered.is_visited(node) && !walk.finished.is_visited(node);
    let mut seen = BTreeSet::from([node]);
    let mut way = vec![node.index()];
    way.extend(walk.stack.iter().rev().filter(|node| on_way(node) && seen.insert(**node)).map(|node| node.index()));
    way.reverse();
    way
}

fn reached<G>(graph: G, from: impl IntoIterator<Item = usize>) -> BTreeSet<usize>
where
    G: GraphRef + IntoNeighbors<NodeId = NodeIndex> + Visitable<NodeId = NodeIndex>,
{
    let mut walk = Dfs::empty(graph);
    let mut reached = BTreeSet::new();
    for node in from {
        walk.move_to(NodeIndex::new(node));
        while let Some(found) = walk.next(graph) {
            reached.insert(found.index());
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(needs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<usize>> {
        Graph::new(needs.iter().cloned()).order()
    }

    /// The same by hand: a walk that looks at one need after the other.
    fn order_by_hand(needs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<usize>> {
        fn walk(needs: &[Vec<usize>], node: usize, way: &mut Vec<usize>, order: &mut Vec<usize>) -> Option<Vec<usize>> {
            way.push(node);
            for &need in &needs[node] {
                if let Some(at) = way.iter().position(|before| *before == need) {
                    let mut cycle = way[at..].to_vec();
                    let first = cycle.iter().enumerate().min_by_key(|(_, node)| **node).map_or(0, |(i, _)| i);
                    cycle.rotate_left(first);
                    return Some(cycle);
                }
                if !order.contains(&need)
                    && let Some(cycle) = walk(needs, need, way, order)
                {
                    return Some(cycle);
                }
            }
            way.pop();
            order.push(node);
            None
        }
        let mut order = Vec::new();
        for root in 0..needs.len() {
            if !order.contains(&root)
                && let Some(cycle) = walk(needs, root, &mut Vec::new(), &mut order)
            {
                return Err(cycle);
            }
        }
        Ok(order)
    }

    #[test]
    fn what_lies_above_and_below_ends_where_it_is_told_to() {
        let graph = Graph::new([vec![], vec![0], vec![1], vec![1, 0]].into_iter());
        assert_eq!(graph.above([3], |_| true), [0, 1, 3].into());
        assert_eq!(graph.above([2], |node| node != 1), [1, 2].into());
        assert_eq!(graph.below(0, |_| true), [0, 1, 2, 3].into());
        assert_eq!(graph.below(0, |node| node != 1), [0, 3].into());
        assert_eq!(graph.reduced(), [vec![], vec![0], vec![1], vec![1]]);
    }

    #[test]
    fn ties_keep_the_written_order() {
        assert_eq!(order(&[vec![], vec![], vec![]]), Ok(vec![0, 1, 2]));
        assert_eq!(order(&[vec![2], vec![], vec![]]), Ok(vec![2, 0, 1]));
    }

    #[test]
    fn a_cycle_starts_at_its_earliest_stage() {
        assert_eq!(order(&[vec![], vec![3], vec![1], vec![2]]), Err(vec![1, 3, 2]));
        assert_eq!(order(&[vec![0]]), Err(vec![0]));
    }

    #[test]
    fn a_very_long_chain_needs_no_stack() {
        let needs: Vec<Vec<usize>> = (0..100_000).map(|i| if i == 99_999 { vec![] } else { vec![i + 1] }).collect();
        assert_eq!(order(&needs).map(|order| order[0]), Ok(99_999));
    }

    proptest! {
        #[test]
        fn the_order_and_the_cycle_are_those_of_a_walk_by_hand(
            mut needs in (1usize..12).prop_flat_map(|n| prop::collection::vec(prop::collection::vec(0..n, 0..4), n))
        ) {
            each_once(&mut needs);
            prop_assert_eq!(order(&needs), order_by_hand(&needs));
        }

        #[test]
        fn a_reduced_graph_says_the_same_with_nothing_to_spare(
            mut needs in (1usize..10).prop_flat_map(|n| prop::collection::vec(prop::collection::vec(0..n, 0..5), n))
        ) {
            for (node, needs) in needs.iter_mut().enumerate() {
                needs.retain(|need| *need < node);
            }
            each_once(&mut needs);
            let (graph, reduced) = (Graph::new(needs.iter().cloned()), Graph::new(needs.iter().cloned()).reduced());
            let of_reduced = |reduced: &[Vec<usize>], node| Graph::new(reduced.iter().cloned()).above([node], |_| true);
            for node in 0..needs.len() {
                prop_assert_eq!(graph.above([node], |_| true), of_reduced(&reduced, node));
                let mut rest = needs[node].iter();
                prop_assert!(reduced[node].iter().all(|need| rest.any(|known| known == need)), "in their order");
                for i in 0..reduced[node].len() {
                    let mut less = reduced.clone();
                    let need = less[node].remove(i);
                    prop_assert!(!of_reduced(&less, node).contains(&need));
                }
            }
        }
    }

    fn each_once(needs: &mut [Vec<usize>]) {
        for needs in needs {
            let mut seen = BTreeSet::new();
            needs.retain(|need| seen.insert(*need));
        }
    }
}
