//! Experts and a router from the clusters of a dense network's own inputs.

use burn::linalg::svd;
use burn::tensor::{Distribution, Int, Tensor, TensorData};

use super::{DenseWeights, UpcycleError};

/// Rounds of k-means; assignments rarely change after ten.
const ROUNDS: usize = 30;
/// Attempts from other first centroids.
const ATTEMPTS: usize = 5;
/// Sweeps that the singular value decomposition may take per value.
const SWEEPS: usize = 100;

/// What the clusters make of a dense network.
pub(super) struct ClusterExperts {
    /// `[E, D, F]`
    pub w_in: Tensor<3>,
    /// `[E, F, D]`
    pub w_out: Tensor<3>,
    /// Unit centroids, `[D, E]`.
    pub router: Tensor<2>,
}

/// Clusters `inputs` `[N, D]` and cuts each expert's weights down to the directions that matter in its cluster.
///
/// Both weights become `W · V · Vᵀ`, with `V` the leading right singular vectors of `X · W`, `X` being what that weight reads in the
/// cluster, as many as carry the share `energy` of the squared singular values: the best weight of that rank on the cluster's data.
pub(super) fn experts_of_clusters(
    weights: &DenseWeights,
    inputs: Tensor<2>,
    num_experts: usize,
    energy: f64,
) -> Result<ClusterExperts, UpcycleError> {
    crate::support::finite::check_finite("the calibration tokens", &inputs)?;
    let device = inputs.device();
    let (assigned, centroids) = best_of_several(unit_rows(inputs.clone()), num_experts);
    let mut experts = (Vec::new(), Vec::new());
    for expert in 0..num_experts {
        let members: Vec<i32> = (0..assigned.len()).filter(|&i| assigned[i] == expert).map(|i| i as i32).collect();
        let count = members.len();
        let members = Tensor::<1, Int>::from_data(TensorData::new(members, [count]), &device);
        let x = inputs.clone().select(0, members);
        let hidden = weights.hidden(x.clone());
        experts.0.push(keep_leading_outputs(weights.w_in.clone(), x, energy));
        experts.1.push(keep_leading_outputs(weights.w_out.clone(), hidden, energy));
    }
    let (w_in, w_out) = (Tensor::stack(experts.0, 0), Tensor::stack(experts.1, 0));
    crate::support::finite::check_finite("w_in of the clusters", &w_in)?;
    crate::support::finite::check_finite("w_out of the clusters", &w_out)?;
    Ok(ClusterExperts { w_in, w_out, router: centroids.transpose() })
}

/// The unit centroids of the directions of `inputs` `[N, D]` in so many clusters, `[clusters, D]`; of one cluster, the mean direction.
pub(super) fn centroids(inputs: Tensor<2>, clusters: usize) -> Result<Tensor<2>, UpcycleError> {
    crate::support::finite::check_finite("the tokens of the probe", &inputs)?;
    Ok(best_of_several(unit_rows(inputs), clusters).1)
}

/// k-means may end with two centroids in one cluster: of several attempts, the one whose rows are nearest to their centroids.
fn best_of_several(x: Tensor<2>, clusters: usize) -> (Vec<usize>, Tensor<2>) {
    let nearness = |centroids: &Tensor<2>| {
        let nearest = x.clone().matmul(centroids.clone().transpose()).max_dim(1);
        nearest.mean().into_scalar::<f32>()
    };
    let attempts = (0..ATTEMPTS).map(|_| spherical_k_means(&x, clusters)).map(|found| (nearness(&found.1), found));
    attempts.max_by(|a, b| a.0.total_cmp(&b.0)).expect("there is an attempt").1
}

/// The cluster of each unit row of `x` `[N, D]`, and the unit centroids `[E, D]`: k-means by the cosine.
fn spherical_k_means(x: &Tensor<2>, clusters: usize) -> (Vec<usize>, Tensor<2>) {
    let [count, _] = x.dims();
    let device = x.device();
    let mut centroids = first_centroids(x, clusters);
    let mut assigned = vec![usize::MAX; count];
    for _ in 0..ROUNDS {
        let cosines: Vec<f32> = read(x.clone().matmul(centroids.clone().transpose()));
        let nearest = |cosines: &[f32]| (1..clusters).fold(0, |best, c| if cosines[c] > cosines[best] { c } else { best });
        let mut next: Vec<usize> = cosines.chunks_exact(clusters).map(nearest).collect();
        refill_empty(&mut next, &cosines, clusters);
        if next == assigned {
            break;
        }
        assigned = next;
        let mut members = vec![0.0f32; clusters * count];
        assigned.iter().enumerate().for_each(|(row, &cluster)| members[cluster * count + row] = 1.0);
        let members = Tensor::<2>::from_data(TensorData::new(members, [clusters, count]), &device);
        centroids = unit_rows(members.matmul(x.clone()));
    }
    (assigned, centroids)
}

/// k-means++ by the squared chord: each centroid is a row drawn with a chance that grows with its distance from those before it.
fn first_centroids(x: &Tensor<2>, clusters: usize) -> Tensor<2> {
    let [count, _] = x.dims();
    let device = x.device();
    let draws: Vec<f32> = read(Tensor::<2>::random([1, clusters], Distribution::Uniform(0.0, 1.0), &device));
    let mut distance = vec![1.0f64; count];
    let mut chosen: Vec<Tensor<2>> = Vec::new();
    for draw in draws {
        let mut left = f64::from(draw) * distance.iter().sum::<f64>();
        let row = distance.iter().position(|d| {
            left -= d;
            left < 0.0
        });
        let row = row.unwrap_or(count - 1);
        let centroid = x.clone().narrow(0, row, 1);
        let cosines: Vec<f32> = read(x.clone().matmul(centroid.clone().transpose()));
        distance.iter_mut().zip(cosines).for_each(|(d, cosine)| *d = d.min(f64::from((2.0 - 2.0 * cosine).max(0.0))));
        chosen.push(centroid);
    }
    Tensor::cat(chosen, 0)
}

/// Gives a cluster without rows the row that is furthest from its own centroid and not alone there.
fn refill_empty(assigned: &mut [usize], cosines: &[f32], clusters: usize) {
    let mut sizes = vec![0; clusters];
    assigned.iter().for_each(|&cluster| sizes[cluster] += 1);
    for empty in 0..clusters {
        if sizes[empty] > 0 {
            continue;
        }
        let cosine = |row: usize| cosines[row * clusters + assigned[row]];
        let movable = (0..assigned.len()).filter(|&row| sizes[assigned[row]] > 1);
        if let Some(row) = movable.min_by(|&a, &b| cosine(a).total_cmp(&cosine(b))) {
            sizes[assigned[row]] -= 1;
            sizes[empty] += 1;
            assigned[row] = empty;
        }
    }
}

/// `W · V · Vᵀ` for the leading right singular vectors `V` of `x · W`: `[D, F], [N, D] -> [D, F]`.
fn keep_leading_outputs(weight: Tensor<2>, x: Tensor<2>, energy: f64) -> Tensor<2> {
    let [d_in, d_out] = weight.dims();
    if energy >= 1.0 {
        return weight;
    }
    // The same right singular vectors as x · W, whatever the number of rows: xᵀx = RᵀR, and R · W has D rows.
    let mapped = if d_in < d_out { square_root_of_gram(x).matmul(weight.clone()) } else { x.matmul(weight.clone()) };
    let leading = leading_right_vectors(mapped, energy);
    weight.matmul(leading.clone()).matmul(leading.transpose())
}

/// `R` with `RᵀR = xᵀx`: `[N, D] -> [D, D]`.
fn square_root_of_gram(x: Tensor<2>) -> Tensor<2> {
    let (vectors, values) = eigen(x.clone().transpose().matmul(x));
    vectors.transpose() * values.sqrt().unsqueeze_dim::<2>(1)
}

/// The right singular vectors of `a` that carry the share `energy` of its squared singular values: `[M, N] -> [N, R]`.
fn leading_right_vectors(a: Tensor<2>, energy: f64) -> Tensor<2> {
    let [rows, cols] = a.dims();
    let is_wide = rows < cols;
    let gram = if is_wide { a.clone().matmul(a.clone().transpose()) } else { a.clone().transpose().matmul(a.clone()) };
    let (vectors, values) = eigen(gram);
    let rank = rank_of(&read(values.clone().unsqueeze_dim::<2>(0)), energy);
    let vectors = vectors.narrow(1, 0, rank);
    if !is_wide {
        return vectors;
    }
    // From left to right vectors: aᵀu is v times its singular value, which may be nothing but rounding.
    unit_rows(vectors.transpose().matmul(a)).transpose()
}

/// Eigenvectors (as columns) and eigenvalues, largest first, of a symmetric matrix without negative ones: its singular ones.
fn eigen(symmetric: Tensor<2>) -> (Tensor<2>, Tensor<1>) {
    let (vectors, values, _) = svd::<2, 1>(symmetric, SWEEPS);
    (vectors, values)
}

/// How many of the leading `values` carry the share `energy` of their sum; at least one, and none that is only rounding.
fn rank_of(values: &[f32], energy: f64) -> usize {
    let total: f64 = values.iter().map(|&v| f64::from(v)).sum();
    let floor = f64::from(values[0]) * 1e-6;
    let mut carried = 0.0;
    let mut rank = 0;
    for &value in values.iter().take_while(|&&value| f64::from(value) > floor) {
        if carried >= energy * total {
            break;
        }
        carried += f64::from(value);
        rank += 1;
    }
    rank.max(1)
}

fn unit_rows(x: Tensor<2>) -> Tensor<2> {
    let norm = x.clone().square().sum_dim(1).sqrt().clamp_min(1e-12);
    x / norm
}

fn read(x: Tensor<2>) -> Vec<f32> {
    x.try_into_vec_as().expect("a float tensor reads as f32")
}
