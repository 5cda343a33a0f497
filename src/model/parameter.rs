//! What is trained, and its gradients.

/// One trained tensor; `V` is where its values lie.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter<V = Vec<f32>> {
    /// Its name in the file it is saved to.
    pub name: String,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Row-major, in f32 whatever the storage of the model.
    pub value: V,
}

impl<V> Parameter<V> {
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }

    /// The number of its values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One sum of gradients per trained tensor, in the order of [`super::decoder::Decoder::params`].
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<V = Vec<f32>> {
    /// Of each tensor, row-major in f32.
    pub values: Vec<V>,
}

impl Gradients {
    /// Zeros for tensors like these.
    pub fn zeros<V>(params: &[Parameter<V>]) -> Gradients {
        Gradients { values: params.iter().map(|param| vec![0.0; param.values()]).collect() }
    }

    /// Back to zero, keeping the memory.
    pub fn clear(&mut self) {
        self.values.iter_mut().for_each(|values| values.fill(0.0));
    }
}
