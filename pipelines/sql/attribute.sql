-- Rewards or shown events `later` with the number of the partition of their decision, in `files`; -1 where it is not there, or in
-- several of them: then nobody can say which of its contents they belong to.
with aimed as (
    select e.*, case when $by_root then coalesce(r.root, e.decision_id) else e.decision_id end as attributed_id
    from later as e
    left join roots as r on r.decision_id = e.decision_id
),

wanted as (
    select distinct attributed_id from aimed
),

found as (
    select d.decision_id, min(f.number) as number
    from read_parquet($files, filename = true) as d
    inner join wanted as w on w.attributed_id = d.decision_id
    inner join files as f on f.filename = d.filename
    group by d.decision_id
    having count(distinct f.number) = 1
)

select a.*, coalesce(f.number, -1) as number
from aimed as a
left join found as f on f.decision_id = a.attributed_id
order by number
