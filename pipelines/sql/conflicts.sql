-- Decisions of `near` files whose id is in a `fresh` file and came with several contents.
with fresh as (
    select distinct decision_id from read_parquet($fresh)
),

every as (
    select d.decision_id, d.filename, d.policy
    from read_parquet($near, filename = true) as d
    inner join fresh as f on f.decision_id = d.decision_id
),

twice as (
    select decision_id from every group by decision_id having count(*) > 1
)

select e.decision_id, e.filename, e.policy
from every as e
inner join twice as t on t.decision_id = e.decision_id
